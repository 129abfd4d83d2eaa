import itertools
import os
import tempfile
from types import SimpleNamespace

from modules.options import OptionInfo, Options

__all__ = ["OptionInfo", "cmd_opts", "config_filename", "opts", "state"]

config_filename = os.path.join(tempfile.mkdtemp(prefix="forge-standin-"), "config.json")
cmd_opts = SimpleNamespace(api_auth=None, subpath=None)
opts = Options(
    {
        "forge_async_loading": "Queue",
        "forge_inference_memory": 1024,
        "forge_pin_shared_memory": "CPU",
    }
)
for _key in list(opts.data):
    opts.add_option(_key, OptionInfo(opts.data[_key]))


class State:
    job = ""
    time_start = None
    _clock = itertools.count()

    def begin(self, job="(unknown)"):
        self.job, self.time_start = job, next(self._clock)

    def end(self):
        self.job = ""


state = State()
