"""What a run leaves: directories of trained tensors, checked, loaded and exported."""
