"""Devices that are external servers: engines such as vLLM, llama.cpp and Triton, and hosted providers.

A protocol is one file (`openai`, `oip`): it turns a row into an HTTP request and reads the answer as it comes, without
I/O. `http` does the I/O, `stage` runs the jobs, `places` says how much the server gets, and `variants` what it runs.
Forbidden here: threads that wait for one job.
"""
