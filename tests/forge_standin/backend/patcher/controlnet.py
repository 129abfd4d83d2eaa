from backend.operations import main_stream_worker, weights_manual_cast

__all__ = ["main_stream_worker", "weights_manual_cast"]
