"""Trials of placement: several models that compete for unlike hardware.

`catalogue` names them, `arrivals` draws their requests.
"""
