"""Where things happen in a model: sites, positions, hooks, reading, intervening, replay."""
