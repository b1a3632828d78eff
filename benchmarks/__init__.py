"""Speed and memory, beside other packages; faithfulness of every setting."""
