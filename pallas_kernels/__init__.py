"""Array kernels: local arrays in, local arrays out; one op a folder, several implementations each."""

import importlib

# Each op is imported here, once and eagerly: a folder has the name of its op, and importing the
# folder later would put the module where the function belongs.
for _folder, _names in {
    "grouped_matmul": ("grouped_matmul",),
    "lightning_attention": ("lightning_attention", "lightning_decode"),
    "softmax_attention": ("softmax_attention",),
}.items():
    try:
        _module = importlib.import_module(f"{__name__}.{_folder}.api")
    except ImportError:
        continue
    globals().update({_name: getattr(_module, _name) for _name in _names})
