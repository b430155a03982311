"""Plain Python functions that the catalogue offers as models (`runtime: python`): one module each, named by `entry`.

A module gives `call(**inputs) -> outputs`: one row's inputs by name as scalars or arrays (`-` in a name becomes `_`),
and a dict of its outputs by name. Only what lies here can be called; no request names a module.
"""
