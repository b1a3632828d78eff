"""Results for people: in words, tables, pictures, pages and experiment trackers."""
