import json


class OptionInfo:
    def __init__(
        self,
        default=None,
        label="",
        component=None,
        component_args=None,
        onchange=None,
        section=None,
        infotext=None,
    ):
        self.default, self.label = default, label
        self.component, self.component_args = component, component_args
        self.onchange, self.section, self.infotext = onchange, section, infotext
        self.comment_after = ""

    def info(self, text):
        self.comment_after += text
        return self


class Options:
    """Values that the file holds are there from the start, defaults only once an option was added, as in the
    real one."""

    def __init__(self, data):
        super().__setattr__("data", dict(data))
        super().__setattr__("data_labels", {})
        super().__setattr__("frozen", False)

    def __getattr__(self, key):
        if key in self.data:
            return self.data[key]
        if key in self.data_labels:
            return self.data_labels[key].default
        raise AttributeError(key)

    def __setattr__(self, key, value):
        assert not self.frozen, "changing settings is disabled"
        self.data[key] = value

    def add_option(self, key, info):
        self.data_labels[key] = info
        self.data.setdefault(key, info.default)

    def set(self, key, value, is_api=False, run_callbacks=True):
        if self.data.get(key) == value:
            return False
        self.data_labels[key]
        setattr(self, key, value)
        return True

    def save(self, filename):
        with open(filename, "w", encoding="utf8") as file:
            json.dump(self.data, file)
