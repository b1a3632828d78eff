"""What a model, its data and its use are made from: plain data that hypothesis draws, and people can read."""

from dataclasses import dataclass, replace

from hypothesis import strategies as st

from tests.fuzz import ends, layers, sequences, shapes, stateful, tricks  # noqa: F401 (they register parts)
from tests.fuzz.parts import LONGEST, PARTS, Level, names

KINDS = ("vectors", "floats", "ids", "images")

# Each habit or form with what the package owes to those who have it.
HABITS = {
    "lightning": Level.PLAIN,  # the model is a LightningModule that declares its output
    "aliased": Level.ODD,  # the first part has a second name
    "weights_tied": Level.ODD,  # parts whose layers have one shape have one weight
    "part_repeated": Level.ODD,  # the first part stands at the end of the body again
    "in_place_input": Level.ODD,
    "in_place_mask": Level.ODD,
    "pops_labels": Level.ODD,  # from the batch
    "own_forward": Level.PLAIN,  # forward= in place of a call on the batch
    "one_shard": Level.PLAIN,  # for all training examples, of which two are then audited; else one for each batch
    "unaudited": Level.PLAIN,  # audit=0, as it is for most examples of a large shard
    "double_precision": Level.PLAIN,  # a Trainer with precision="64-true"
}
RETURNS = {"tensor": Level.PLAIN, "tuple": Level.PLAIN, "dict": Level.PLAIN, "object": Level.ODD}
OUTPUTS = {
    "margin": Level.PLAIN,
    "regression": Level.PLAIN,
    "loss": Level.PLAIN,
    "own": Level.PLAIN,
    "binary": Level.PLAIN,
    "mean_loss": Level.ODD,
}
FORMS = {
    "tuple": Level.PLAIN,
    "dict": Level.PLAIN,
    "list": Level.PLAIN,
    "ordered": Level.PLAIN,
    "named": Level.PLAIN,
    "dataclass": Level.PLAIN,
    "nested": Level.PLAIN,
    "user_dict": Level.ODD,
    "read_only": Level.ODD,
    "object": Level.WILD,
    "rows": Level.WILD,  # the inputs as a list of tensors, one for each example
    "examples_second": Level.WILD,  # the inputs as (steps, batch, width)
}
EXTRAS = {
    "weights": Level.PLAIN,  # a number for each example, as a tensor
    "scalar": Level.PLAIN,  # a tensor without dimensions, for all
    "text": Level.PLAIN,  # one for all
    "texts": Level.ODD,  # one for each
    "numbers": Level.ODD,  # a list of numbers, one for each example, which are used
    "class_names": Level.ODD,  # as many as there are classes, not used
    "image_size": Level.ODD,  # a pair of numbers, not used
    "nothing": Level.ODD,  # None
    "scales": Level.WILD,  # a list of three numbers for all, which are used
    "class_weights": Level.WILD,  # the same as a tensor
    "table": Level.WILD,  # a tensor of (1, 3) for all
    "count": Level.WILD,  # the batch's size, by which logits are divided
    "sum_of_weights": Level.WILD,  # the same for the sum of the weights
}
CHECKPOINTS = ("own", "random", "zero_head", "zero_body")
SELECTIONS = ("all", "head", "body", "biases")


@dataclass(frozen=True)
class Spec:
    """A model, its data, and how it is attributed.

    Attributes:
        kind: of the inputs.
        stem: the first part.
        sequence: parts from sequence to sequence, used if the stem gives one.
        pool: from sequence to vector, used in the same case.
        vector: parts from vector to vector.
        head: the last part.
        habits: names of HABITS.
        returns: what the model returns logits in.
        output: name of the output.
        form: of the batches.
        extras: what else the batches hold.
        checkpoints: how the weights of each differ from the model's own.
        frozen: parameters of these numbers, modulo their count, require no gradient.
        selection: which parameters are asked for.
        train: length of each training example.
        targets: length of each target.
        batch: size of the training batches.
        target_batch: size of the targets' batches.
        seed: of weights and data.
    """

    kind: str = "vectors"
    stem: str = "Vectors"
    sequence: tuple[str, ...] = ()
    pool: str = "Mean"
    vector: tuple[str, ...] = ()
    head: str = "Linear"
    habits: frozenset[str] = frozenset()
    returns: str = "tensor"
    output: str = "margin"
    form: str = "tuple"
    extras: tuple[str, ...] = ()
    checkpoints: tuple[str, ...] = ("own",)
    frozen: tuple[int, ...] = ()
    selection: str = "all"
    train: tuple[int, ...] = (3, 3, 3, 3)
    targets: tuple[int, ...] = (3, 3)
    batch: int = 2
    target_batch: int = 2
    seed: int = 0

    @property
    def is_sequence(self) -> bool:
        return PARTS[self.stem].gives == "sequence"

    @property
    def body(self) -> tuple[str, ...]:
        """The parts between stem and head."""
        return (*self.sequence, self.pool, *self.vector) if self.is_sequence else self.vector

    @property
    def level(self) -> Level:
        """What the package owes: the least that it owes to any of its parts."""
        used = [PARTS[name].level for name in (self.stem, *self.body, self.head)]
        used += [HABITS[name] for name in self.habits] + [EXTRAS[name] for name in self.extras]
        used += [RETURNS[self.returns], OUTPUTS[self.output], FORMS[self.form]]
        if self.frozen or self.selection != "all" or len(self.train) == 1:
            used.append(Level.ODD)  # hooks may be left with nothing to cover, or to see
        return max(used)


def _up_to(table: dict[str, Level], limit: Level) -> list[str]:
    return [name for name, level in table.items() if level <= limit]


def _seldom(choices: list[str]) -> st.SearchStrategy[str]:
    """The usual choice half of the time."""
    return st.one_of(st.just(choices[0]), st.sampled_from(choices))


def _few(choices: list[str], most: int) -> st.SearchStrategy[list[str]]:
    """None half of the time."""
    return st.one_of(st.just([]), st.lists(st.sampled_from(choices), max_size=most, unique=True))


@st.composite
def specs(draw: st.DrawFn) -> Spec:
    """Random specifications: plain ones, odd ones, and odd ones with one wild thing."""
    wanted = draw(st.sampled_from([Level.PLAIN, Level.ODD, Level.ODD, Level.WILD]))
    limit = min(wanted, Level.ODD)
    kind = draw(st.sampled_from(KINDS))
    sizes = st.integers(1, LONGEST)
    plain = wanted == Level.PLAIN

    def parts(takes: str, most: int) -> tuple[str, ...]:
        return tuple(draw(st.lists(st.sampled_from(names(takes, limit)), max_size=most)))

    spec = Spec(
        kind=kind,
        stem=draw(st.sampled_from(names(kind, limit))),
        sequence=parts("sequence", 3),
        pool=draw(st.sampled_from(names("pool", limit))),
        vector=parts("vector", 2),
        head=draw(_seldom(names("head", limit))),
        habits=frozenset(draw(_few(_up_to(HABITS, limit), 3))),
        returns=draw(_seldom(_up_to(RETURNS, limit))),
        output=draw(_seldom(_up_to(OUTPUTS, limit))),
        form=draw(_seldom(_up_to(FORMS, limit))),
        extras=tuple(draw(_few(_up_to(EXTRAS, limit), 2))),
        checkpoints=tuple(draw(st.lists(st.sampled_from(CHECKPOINTS), min_size=1, max_size=2))),
        frozen=() if plain else tuple(draw(st.one_of(st.just([]), st.lists(st.integers(0, 9), max_size=2)))),
        selection="all" if plain else draw(_seldom(list(SELECTIONS))),
        train=tuple(draw(st.lists(sizes, min_size=2 if plain else 1, max_size=12))),
        targets=tuple(draw(st.lists(sizes, min_size=1, max_size=5))),
        batch=draw(sizes),
        target_batch=draw(sizes),
        seed=draw(st.integers(0, 9)),
    )
    return spec if wanted <= Level.ODD else draw(_one_wild_thing(spec))


def _one_wild_thing(spec: Spec) -> st.SearchStrategy[Spec]:
    spec = replace(spec, habits=spec.habits - {"unaudited"})  # the audit is what finds most of them

    def wild(takes: str) -> list[str]:
        return [name for name in names(takes, Level.WILD) if PARTS[name].level == Level.WILD]

    changes = [{"stem": name} for name in wild(spec.kind)]
    changes += [{"form": name} for name, level in FORMS.items() if level == Level.WILD]
    changes += [{"extras": (name,)} for name, level in EXTRAS.items() if level == Level.WILD]
    changes += [{"vector": (name, *spec.vector)} for name in wild("vector")]
    changes += [{"sequence": (*spec.sequence, name)} for name in wild("sequence") if spec.is_sequence]
    return st.sampled_from([replace(spec, **change) for change in changes])


def alone() -> dict[str, Spec]:
    """Each part, habit and form in the plainest model, most of whose gradients are zero at the first checkpoint."""
    common = {
        "train": (3, 3, 1, 4),
        "targets": (1, 4),
        "batch": 2,
        "checkpoints": ("zero_head", "random"),
        "habits": frozenset({"one_shard"}),
    }
    base = {kind: Spec(kind=kind, stem=names(kind, Level.PLAIN)[0], **common) for kind in KINDS}
    floats, ids, vectors = base["floats"], base["ids"], base["vectors"]
    busy = replace(ids, sequence=("Dense", "Attention"), vector=("Dense",))
    found = {}
    for name, cls in PARTS.items():
        if cls.takes[0] in KINDS:
            found[name] = replace(base[cls.takes[0]], stem=name)
        if "sequence" in cls.takes:
            found[f"{name} of steps" if "vector" in cls.takes else name] = replace(floats, sequence=(name,))
        if "vector" in cls.takes:
            found[name] = replace(vectors, vector=(name,))
        if "pool" in cls.takes:
            found[name] = replace(floats, pool=name)
        if "head" in cls.takes:
            found[name] = replace(ids, head=name)
    for name in HABITS:
        pops = {"output": "loss", "form": "dict"} if name == "pops_labels" else {}
        found[name] = replace(busy, habits=busy.habits | {name}, **pops)
    found["in_place_input of floats"] = replace(floats, habits=floats.habits | {"in_place_input"})
    floats = replace(floats, checkpoints=("random",))
    for field, table in (("output", OUTPUTS), ("returns", RETURNS), ("form", FORMS), ("selection", SELECTIONS)):
        found |= {f"{field} {name}": replace(floats, **{field: name}) for name in table}
    return found | {f"extra {name}": replace(floats, extras=(name,)) for name in EXTRAS}
