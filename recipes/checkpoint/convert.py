"""A sharded checkpoint as one file, and one file as a sharded checkpoint."""

from pathlib import Path

from mixers.registry import SpecError


def convert(ckpt_path: str = "last", out: str = "", root: str = "runs") -> None:
    """Writes a sharded checkpoint, which is a folder, as one file, and one file as a sharded checkpoint.

    Weights, optimizer and all else stay as they are: training goes on from either. Nothing needs it: every command and
    strategy opens both.

    Args:
        ckpt_path: the checkpoint; "last" is that of the newest run.
        out: what to write, which must not exist: a file from a folder, a folder from a file.
        root: folder of runs, for "last".

    Raises:
        SpecError: no such checkpoint; one that cannot be written; optimizers of another kind of model than ours, whose
            parameters have no known order.
    """
    if not out:
        raise SpecError("give --out, the file or folder to write")
    target = Path(out)
    if target.exists():
        raise SpecError(f"--out {out} exists")
    import torch

    from lit_modules.base import SequenceModule, parameter_groups
    from lit_modules.sharded import load_whole, save_sharded
    from recipes.checkpoint.opening import open_checkpoint
    from recipes.results import written_whole

    saved = open_checkpoint(ckpt_path, root=root)
    sharded = saved.path.is_dir()
    checkpoint = load_whole(saved.path)
    with written_whole(target) as part:
        if sharded:
            torch.save(checkpoint, part)
        else:
            model = saved.load(SequenceModule)
            names = {id(parameter): name for name, parameter in model.named_parameters()}
            groups = parameter_groups(model, 0.0)
            save_sharded(checkpoint, part, [names[id(x)] for group in groups for x in group["params"]])
    print(f"{saved.path}, {'sharded' if sharded else 'one file'}, written to {target}{'' if sharded else '/'}")
