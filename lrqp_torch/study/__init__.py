"""The post's results: where the order of the names is knowable, and where it is used."""
