"""From a local Hugging Face folder to a torchtune decoder: one file a question.

``config`` what does ``config.json`` say, ``rope`` and ``families`` what does it mean, ``weights``
under which names, and ``folder`` in which files.
"""
