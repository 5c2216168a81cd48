"""Phase 1 and phase 2 over ranks, whatever the engine and the communicator."""
