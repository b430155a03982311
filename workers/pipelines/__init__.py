"""Pre- and postprocessing (`workers.port`), a file a kind of model: `tensors`, `text`, `image`, `generation` and `chat`."""
