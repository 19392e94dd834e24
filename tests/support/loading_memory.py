"""Print the peak of a process's own memory while a directory is loaded, and the result's bytes.

Arguments: the directory, and the ``base_quantization`` if not NF4.
"""

import sys
import threading
import time
from pathlib import Path

import torch
import transformers.models.llama.modeling_llama  # noqa: F401  # before the measurement

from qst_tune.backbone.loading import load_transformers_backbone
from qst_tune.backbone.placing import quantization_config_type
from qst_tune.models import qst_from_hf
from qst_tune.modules.memory import parameter_bytes


def own_memory() -> int:
    """Bytes that are not a view of a file."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


def main() -> None:
    directory = Path(sys.argv[1])
    with torch.device("meta"):
        form = sys.argv[2] if len(sys.argv) > 2 else "nf4"
        model = qst_from_hf(str(directory), base_quantization=form)
    quantization_config_type()
    before, peak, done = own_memory(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, own_memory())
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    load_transformers_backbone(
        model.backbone, directory, dtype=torch.bfloat16, device=torch.device("cpu")
    )
    done.set()
    watcher.join()
    sys.stdout.write(f"{peak - before} {parameter_bytes(model.frozen)}\n")


main()
