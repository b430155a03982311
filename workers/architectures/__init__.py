"""The networks that several models share: one module `<entry>_torch` or `<entry>_jax` each.

A network of a single model lies beside its model.yaml, and `tasks.models.files` finds both. A variant's `entry` names
the module without its ending, so `entry: minilm` on the runtime `torch` is `minilm_torch.py`. What each module gives:

- `<entry>_torch`: `build(weights) -> torch.nn.Module`; its `forward` takes the inputs by name and returns a dict of
  outputs by name. `weights` is the file's tensors by name, on the CPU. Precision and device are the runtime's business.
- `<entry>_jax`: `apply(weights, inputs) -> outputs`, three dicts of arrays by name; pure, so that it can be compiled.
"""
