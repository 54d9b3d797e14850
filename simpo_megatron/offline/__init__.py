"""Work on whole checkpoints and model folders without a run: convert, compare and average, tensor by tensor."""
