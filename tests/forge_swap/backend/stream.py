stream_activated = False
current_stream = None
mover_stream = None
stream_context = None
