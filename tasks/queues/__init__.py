"""Parts of queues.yaml, which `tasks.topology` composes: endpoints, limits, hours, localities; and the file itself.

Forbidden here: importing `tasks.topology`, except by `queues_file`, which follows the whole file.
"""
