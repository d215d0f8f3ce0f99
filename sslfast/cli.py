"""The command `sslfast`: finds the module of a subcommand and hands it the arguments."""

import importlib
import sys

from sslfast.training import UserError, failures

COMMANDS = {
    "simclr": ("sslfast.methods.simclr", "train an encoder on unlabelled images with SimCLR"),
    "moco": ("sslfast.methods.moco", "train an encoder on unlabelled images with MoCo v1, v2 or v3"),
    "ddpm": ("sslfast.methods.ddpm", "train a diffusion model that draws images"),
    "ssgan": ("sslfast.methods.ssgan", "train a GAN that draws images, with self-supervised rotations or without"),
    "sample": ("sslfast.evaluation.sample", "draw images from a ddpm or ssgan run, go from one image to another"),
    "evaluate": ("sslfast.evaluation.evaluate", "judge the encoder of a run: kNN, linear probe, pictures"),
    "augment-gallery": ("sslfast.evaluation.gallery", "draw what an augmentation makes of a data set"),
    "selftest": ("sslfast.selftest", "compare every kernel that this machine can run with the reference"),
    "info": ("sslfast.info", "what was built, and what of it this machine uses"),
}

HELP = """usage: sslfast COMMAND [OPTIONS]

Self-supervised learning on fast kernels.

commands:
{commands}

Try: sslfast simclr --data digits --batch-size 128 --epochs 20   (half a minute; needs no data)
     sslfast COMMAND --help                                       (all options of a command)
"""


def main(args: list[str] | None = None) -> int:
    """Run `sslfast ARGS` and return the exit status: 0, 1 for a failure that the person can mend, 2 for wrong usage."""
    args = sys.argv[1:] if args is None else args
    listing = HELP.format(commands="\n".join(f"  {name:18s}{text}" for name, (_, text) in COMMANDS.items()))
    if not args or args[0] in ("-h", "--help"):
        print(listing)
        return 0 if args else 2
    if args[0] not in COMMANDS:
        print(f"sslfast: there is no command {args[0]!r}\n\n{listing}", file=sys.stderr)
        return 2
    try:
        importlib.import_module(COMMANDS[args[0]][0]).main(args[1:])
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        said = str(error) if isinstance(error, UserError) else failures.sentence(error)
        if said is None:
            raise
        print(f"sslfast {args[0]}: {said}", file=sys.stderr)
        return 1
    return 0
