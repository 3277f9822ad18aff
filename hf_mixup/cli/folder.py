"""The folder that a run writes to."""

from __future__ import annotations

import time

from accelerate.utils import broadcast_object_list
from transformers import TrainingArguments

from hf_mixup.arguments import RunArguments
from hf_mixup.report.run_folder import RunFolder


def choose_folder(run: RunArguments, args: TrainingArguments, name: str, trains: bool = True) -> RunFolder:
    """`output_dir`, or a new folder `runs/<name>-<time>` if it is not set; `args` then has it.

    Raises ValueError for a file, and for a folder in use, if the run trains and neither resumes nor starts over.
    """
    if args.output_dir is None:
        args.output_dir = broadcast_object_list([f"runs/{name}-{time.strftime('%Y%m%d-%H%M%S')}"])[0]  # the clocks of processes differ
    folder = RunFolder(args.output_dir)
    folder.check()
    if run.report_dir is not None:
        RunFolder(run.report_dir).check("report_dir")
    if trains and folder.used and not (run.overwrite_output_dir or args.resume_from_checkpoint):
        raise ValueError(
            f"output_dir must be new or empty, got {args.output_dir}; resume with --resume_from_checkpoint, or start over with --overwrite_output_dir."
        )
    return folder
