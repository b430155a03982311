"""The stages of a job in a worker: fetch, admit, device, finish; and the streams of generated answers."""
