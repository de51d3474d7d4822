"""Procedural textures of the world's built (and burning) materials: brick, wood, stone, road, fire.

The rules are those of ``textures_nature``: NumPy ``Generator`` in, float32 RGB (S, S, 3) out, about 0..1.
"""

from __future__ import annotations

import numpy as np

from reclip_d2.toy.noise import SIZE, cell_distances, fractal_noise, pixel_grid, value_noise
from reclip_d2.toy.textures_nature import color, mix, smoothstep


def brick(rng: np.random.Generator) -> np.ndarray:
    """Running bond: courses shifted by half a brick, bricks of many tones with a lit upper edge."""
    y, x = pixel_grid()
    height = rng.uniform(7.5, 10.5)
    width = height * rng.uniform(2.0, 2.4)
    row = (y + rng.uniform(0, height)) / height
    course = np.floor(row)
    col = (x + rng.uniform(0, width)) / width + 0.5 * (course % 2)
    number = np.floor(col)
    dy, dx = (row - course) * height, (col - number) * width
    edge = np.minimum(np.minimum(dy, height - dy), np.minimum(dx, width - dx)) + 0.25 * value_noise(rng, 32, 32)
    tones = rng.random((int(course.max()) + 1, int(number.max()) + 1), dtype=np.float32)
    tone = tones[course.astype(np.int64), number.astype(np.int64)]
    dark, bright = color(rng, (110, 48, 34), (128, 66, 44)), color(rng, (186, 96, 66), (204, 122, 84))
    light = 0.18 * smoothstep(3.0 - dy, 0, 1.0) - 0.15 * smoothstep(dy - height + 3.0, 0, 1.0)
    body = mix(dark, bright, 0.15 + 0.7 * tone + 0.12 * value_noise(rng, 40, 40) + light)
    mortar = color(rng, (176, 160, 142), (206, 194, 180)) + 0.03 * value_noise(rng, 48, 48)[..., None]
    return mix(mortar, body, smoothstep(edge, 0.5, 1.3))


def wood(rng: np.random.Generator) -> np.ndarray:
    """Horizontal planks: streaks of grain that bend round a knot, dark seams, every plank its own tone."""
    y, x = pixel_grid()
    height = rng.uniform(17.0, 27.0)
    row = (y + rng.uniform(0, height)) / height
    plank = np.floor(row)
    draws = rng.random((2, int(plank.max()) + 1), dtype=np.float32)
    tone, knot_x = draws[:, plank.astype(np.int64)]
    knot_x = (2 * knot_x - 0.5) * SIZE
    dy = (row - plank - rng.uniform(0.35, 0.65)) * height
    # The grain follows the level lines of height plus a bump: far from the knot straight, near it rings.
    knot = np.exp(-(((x - knot_x) / 13.0) ** 2) - (dy / 6.0) ** 2)
    level = dy + 7.0 * knot * np.sign(dy) + 1.1 * value_noise(rng, 5, 2) + 9.0 * tone
    grain = np.sin(level * (2 * np.pi / rng.uniform(3.6, 5.6))) + 0.55 * value_noise(rng, 60, 4)
    dark, bright = color(rng, (108, 62, 30), (134, 84, 48)), color(rng, (188, 128, 76), (214, 160, 106))
    image = mix(dark, bright, 0.38 + 0.42 * tone + 0.20 * grain - 0.45 * knot**3)
    seam = np.minimum(row - plank, plank + 1 - row) * height
    return mix(image, dark * 0.35, 0.85 * smoothstep(1.3 - seam, 0, 1.0))


def stone(rng: np.random.Generator) -> np.ndarray:
    """Irregular grey field stones, rounded and lit from above, with dark joints."""
    nearest, second, tone = cell_distances(rng, rng.uniform(14.0, 20.0), rng.uniform(1.15, 1.5))
    joint = second - nearest + 0.02 * value_noise(rng, 24, 24)
    dark, bright = color(rng, (92, 90, 88), (116, 112, 106)), color(rng, (164, 160, 154), (190, 184, 174))
    speckle = fractal_noise(rng, 24, 24, 2)
    round_light = -np.gradient(smoothstep(joint, 0.0, 0.45))[0] * -1.6
    image = mix(dark, bright, 0.12 + 0.62 * tone + 0.13 * speckle + round_light)
    return mix(color(rng, (44, 42, 40), (66, 62, 56)), image, smoothstep(joint, 0.03, 0.13))


def road(rng: np.random.Generator) -> np.ndarray:
    """Grey asphalt: coarse grit, worn wheel tracks, a crack, and a painted dashed line."""
    y, x = pixel_grid()
    base = color(rng, (84, 84, 90), (128, 126, 126))
    grit = value_noise(rng, 80, 80) + 0.6 * rng.standard_normal((SIZE, SIZE), dtype=np.float32)
    image = base + (0.055 * grit + 0.03 * value_noise(rng, 2, 4))[..., None]
    across = x + rng.uniform(-0.35, 0.35) * y + 1.5 * value_noise(rng, 2, 2)
    lane = rng.uniform(34.0, 46.0)
    offset = (across + rng.uniform(0, lane)) % lane - lane / 2
    dash = smoothstep(np.sin(y * (2 * np.pi / rng.uniform(22, 30)) + rng.uniform(0, 6.28)), -0.45, -0.3)
    paint = smoothstep(1.9 - np.abs(offset), 0, 0.8) * dash * (0.8 + 0.12 * grit)
    image = mix(image, color(rng, (226, 222, 208), (236, 196, 80)), paint)
    crack = np.abs(fractal_noise(rng, 3, 3, 3, 0.6))
    return mix(image, base * 0.4, 0.75 * smoothstep(0.06 - crack, 0, 0.05))


def fire(rng: np.random.Generator) -> np.ndarray:
    """Flames: turbulence stretched upwards, coloured from dark red through orange to pale yellow."""
    y, x = pixel_grid()
    wobble = (3.5 * value_noise(rng, 6, 4) + 1.2 * value_noise(rng, 16, 12)).astype(np.int64) + np.arange(SIZE)
    rows = np.arange(SIZE)[:, None]
    tongues = fractal_noise(rng, 4, 11, 3, 0.55)[rows, wobble % SIZE]
    heat = np.clip(0.50 + 0.27 * tongues + 0.10 * value_noise(rng, 3, 3), 0, 1)
    stops = np.float32(
        [[0.16, 0.03, 0.02], [0.62, 0.10, 0.03], [0.94, 0.38, 0.05], [1.0, 0.70, 0.16], [1.0, 0.94, 0.62]]
    )
    stops = stops + rng.uniform(-0.04, 0.04, 3).astype(np.float32)
    position = heat * (len(stops) - 1)
    below = np.minimum(np.floor(position), len(stops) - 2)
    index = below.astype(np.int64)
    return mix(stops[index], stops[index + 1], position - below)
