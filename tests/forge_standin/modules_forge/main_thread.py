last_exception = None
