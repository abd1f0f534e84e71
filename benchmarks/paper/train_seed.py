"""Train and score one seed of one variant in this process: all levels of one method, into the folder of the tables.

    python -m benchmarks.paper.train_seed FOLDER --variant regular --seed 0 --teacher synthetic-regular
    python -m benchmarks.paper.train_seed FOLDER --variant irregular --diffusion     (only the variant's own teacher)

Then `python -m benchmarks.paper.tables FOLDER` uses the results. Without --teacher the variant's own diffusion model
is trained first, unless another call has done so; let that finish before starting several seeds. The trainings run in
this process one after the other, which saves importing PyTorch for each; several calls can share one GPU. An
interrupted call resumes.
"""

import argparse
import time
from pathlib import Path

from diffdiscover3d.errors import ModelError
from diffdiscover3d.evaluation.methods import METHODS
from diffdiscover3d.evaluation.paper_tables import Cell, PaperTable


def run_here(arguments: list[str]) -> None:
    """Run a training in this process."""
    from diffdiscover3d.train import main

    if code := main(list(arguments)):
        raise ModelError(f"a training ended with exit code {code}: {' '.join(arguments)}")


def main() -> None:
    """Fill the cells of one variant and seed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--variant", choices=("regular", "irregular"), default="regular")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--method", choices=tuple(METHODS), default="ours")
    parser.add_argument("--level", type=int, nargs="+", choices=(1, 2, 3), default=(1, 2, 3))
    parser.add_argument("--split", choices=("validation", "test"), default="test")
    parser.add_argument("--teacher", help="diffusion model (default: the variant's own is trained)")
    parser.add_argument("--diffusion", action="store_true", help="train the variant's diffusion model and stop")
    parser.add_argument("--max-steps", type=int, help="of every discovery training, for a trial")
    parser.add_argument("--diffusion-steps", type=int, help="of the diffusion training, for a trial")
    options = parser.parse_args()
    overrides = {"max_steps": options.max_steps} if options.max_steps else {}
    table = PaperTable(
        options.folder,
        teacher=options.teacher,
        split=options.split,
        overrides=overrides,
        diffusion_overrides={"max_steps": options.diffusion_steps} if options.diffusion_steps else {},
        run_training=run_here,
    )
    clock = time.perf_counter()
    if options.diffusion:
        print(table.teacher_of(options.variant))
        return
    for level in options.level:
        row = table.fill(Cell(options.variant, options.method, level, options.seed))
        print(
            f"{options.variant} seed {options.seed} level {level}: {row['dice']:.4f} "
            f"(one matching {row['dice_one_matching']:.4f}), {time.perf_counter() - clock:.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
