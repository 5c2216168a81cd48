"""The model as a TensorRT engine: its graph, its folder, and running it."""
