"""Where the layers of a deeper model come from: old ones, copies of old ones, or initial values."""

from dataclasses import dataclass

from megatron_nexus.growth.settings import GrowthConfig


@dataclass(frozen=True)
class LayerOrigin:
    """An old layer, and whether a layer is a copy of it or the layer itself."""

    index: int
    copied: bool = False


def layer_origins(old: int, new: int, settings: GrowthConfig) -> list[LayerOrigin | None]:
    """Return, for each of `new` layers, the old layer that it was or begins as; None if it is drawn.

    Interleaved layers follow equal groups of old ones, the last at the end (LLaMA Pro, Wu et al., 2024), and
    are copies of the old one before them. Stacked ones repeat the old ones in their order (G_stack, Du et
    al., 2024); the last repetition may be cut off.
    """
    origins: list[LayerOrigin | None] = [None] * new
    for i in range(old):
        origins[i + (i * (new - old) // old if settings.placement == "interleaved" else 0)] = LayerOrigin(i)
    match settings.depth_init:
        case "copy":
            for i, origin in enumerate(origins):
                if origin is None and (before := origins[i - 1]):
                    origins[i] = LayerOrigin(before.index, copied=True)
        case "stack":
            origins[old:] = [LayerOrigin(i % old, copied=True) for i in range(old, new)]
        case "random":
            pass
    return origins
