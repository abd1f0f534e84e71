"""Colours of parts, fixed by number and distinguishable with most kinds of colour blindness."""

# grey for part 0, which is usually background; then Okabe and Ito's palette, then Tol's light one
_PALETTE = (
    "#7f7f7f", "#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7",
    "#77aadd", "#ee8866", "#eedd88", "#ffaabb", "#99ddff", "#44bb99", "#bbcc33", "#aaaa00",
)  # fmt: skip


def part_colour(part: int) -> str:
    """The colour of a part as #rrggbb; numbers beyond the palette step through hues by the golden ratio.

    >>> part_colour(0), part_colour(1)
    ('#7f7f7f', '#e69f00')
    """
    if part < len(_PALETTE):
        return _PALETTE[part]
    import colorsys

    red, green, blue = colorsys.hsv_to_rgb((part * 0.61803398875) % 1.0, 0.65, 0.9)
    return f"#{round(red * 255):02x}{round(green * 255):02x}{round(blue * 255):02x}"


def part_rgb(part: int) -> tuple[float, float, float]:
    """The same as red, green, blue in [0, 1]."""
    code = part_colour(part)
    return tuple(int(code[i : i + 2], 16) / 255 for i in (1, 3, 5))
