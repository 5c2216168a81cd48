"""The model in torch, on the CPU and on CUDA GPUs."""
