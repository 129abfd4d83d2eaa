"""Puts the root's style.css, which stays where Forge looks for it, beside the scripts in the wheel."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

_STYLE = "style.css"


class BuildWithStyle(build_py):
    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            target = self._style_target()
            target.parent.mkdir(parents=True, exist_ok=True)
            self.copy_file(_STYLE, str(target))

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        return [*super().get_outputs(include_bytecode), str(self._style_target())]

    def get_source_files(self) -> list[str]:
        return [*super().get_source_files(), _STYLE]

    def _style_target(self) -> Path:
        return Path(self.build_lib, "lib_qswap", "panel", "web", _STYLE)


setup(cmdclass={"build_py": BuildWithStyle})
