"""What the systems are, as data: classes, key maps, presets and names."""
