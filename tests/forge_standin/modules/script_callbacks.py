callback_map = {}


def _registrar(category):
    callback_map[category] = []

    def register(callback, *, name=None):
        callback_map[category].append(callback)

    return register


on_ui_settings = _registrar("ui_settings")
on_after_component = _registrar("after_component")
on_before_ui = _registrar("before_ui")
on_app_started = _registrar("app_started")
on_model_loaded = _registrar("model_loaded")
on_cfg_denoiser = _registrar("cfg_denoiser")
on_script_unloaded = _registrar("script_unloaded")


def run(category, *args, **kwargs):
    for callback in callback_map[category]:
        callback(*args, **kwargs)


def clear_callbacks():
    for callbacks in callback_map.values():
        callbacks.clear()
