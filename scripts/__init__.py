"""The journey's scripts: one `build_*` per room, and what they share."""
