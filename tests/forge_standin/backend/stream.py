stream_activated = False
current_stream = None
mover_stream = None


def should_use_stream():
    return stream_activated and current_stream is not None and mover_stream is not None
