import importlib.util
import os
from types import SimpleNamespace

from modules import script_callbacks

AlwaysVisible = object()
scripts_data = []


class Script:
    filename = None
    is_img2img = False

    def title(self):
        raise NotImplementedError

    def ui(self, is_img2img):
        pass

    def show(self, is_img2img):
        return True

    def before_process(self, p, *args):
        pass

    def process(self, p, *args):
        pass

    def postprocess_batch(self, p, *args, **kwargs):
        pass

    def elem_id(self, item_id):
        return f"script_{'img2img' if self.is_img2img else 'txt2img'}_{self.title().lower()}_{item_id}"


def load_scripts(paths):
    """Executes each file as a new module, as the real one does at its start and on every Reload UI."""
    scripts_data.clear()
    script_callbacks.clear_callbacks()
    for path in paths:
        spec = importlib.util.spec_from_file_location(os.path.basename(path), path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        for value in module.__dict__.values():
            if isinstance(value, type) and issubclass(value, Script):
                scripts_data.append(SimpleNamespace(script_class=value, path=path, module=module))


class ScriptRunner:
    def __init__(self, is_img2img=False):
        self.scripts = [data.script_class() for data in scripts_data]
        for script in self.scripts:
            script.is_img2img = is_img2img

    def before_process(self, p):
        for script in self.scripts:
            script.before_process(p)

    def process(self, p):
        for script in self.scripts:
            script.process(p)

    def postprocess_batch(self, p, images, **kwargs):
        for script in self.scripts:
            script.postprocess_batch(p, images=images, **kwargs)
