"""Procedural textures of the 12 materials: natural ones first, then built ones and fire; each named after its material.

Every function draws one texture: NumPy ``Generator`` in, float32 RGB (S, S, 3) out, about 0..1 (the caller
clips). Colours and scales vary from draw to draw and overlap within a pair, so that telling the two apart
requires the texture too.
"""

from __future__ import annotations

import math

import numpy as np

from reclip_d2.toy.noise import SIZE, cell_distances, fractal_noise, pixel_grid, scattered_stamps, value_noise


def color(rng: np.random.Generator, low: tuple, high: tuple) -> np.ndarray:
    """A random colour (3,) between ``low`` and ``high`` with a little jitter; RGB, 0-255 in, 0-1 out."""
    t = rng.random(dtype=np.float32)
    mixed = (1 - t) * np.asarray(low, np.float32) + t * np.asarray(high, np.float32)
    return mixed / 255 + rng.uniform(-0.03, 0.03, 3).astype(np.float32)


def mix(first: np.ndarray, second: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """(1 - weight) first + weight second.

    Args:
        first, second: colours (3,) or images (S, S, 3).
        weight: (S, S), clipped to 0..1.
    """
    weight = np.clip(weight, 0, 1)[..., None]
    return first + (second - first) * weight


def smoothstep(value: np.ndarray, low: float, high: float) -> np.ndarray:
    """Hermite step from 0 (value <= low) to 1 (value >= high)."""
    t = np.clip((value - low) / (high - low), 0, 1)
    return t * t * (3 - 2 * t)


def sky(rng: np.random.Generator) -> np.ndarray:
    """Blue gradient, paler to the horizon, with soft clouds stretched along it."""
    y, _ = pixel_grid()
    zenith, horizon = color(rng, (38, 96, 184), (84, 148, 220)), color(rng, (150, 192, 232), (192, 216, 238))
    image = mix(zenith, horizon, y / SIZE * rng.uniform(0.7, 1.0) + 0.06 * value_noise(rng, 2, 2))
    field = fractal_noise(rng, 4, 2, 4, 0.55)
    cover = smoothstep(field, rng.uniform(-0.1, 0.6), 1.7)
    shade = 0.93 + 0.05 * value_noise(rng, 8, 6)
    return mix(image, np.float32([1.0, 0.99, 0.98]) * shade[..., None], 0.92 * cover)


def water(rng: np.random.Generator) -> np.ndarray:
    """Blue-green waves: warped horizontal ripples, darker troughs, bright glints on the crests."""
    y, x = pixel_grid()
    deep, crest = color(rng, (14, 62, 112), (36, 100, 150)), color(rng, (86, 150, 190), (130, 186, 214))
    warp = value_noise(rng, 6, 4) * rng.uniform(1.2, 2.2) + value_noise(rng, 14, 8) * 0.7
    period = rng.uniform(7.0, 11.0)
    ripple = np.sin((y + warp * 1.6 + 0.06 * x * rng.uniform(-1, 1)) * (2 * np.pi / period) + rng.uniform(0, 6.28))
    ripple = 0.65 * ripple + 0.35 * np.sin((y + 2.2 * warp) * (2 * np.pi / (period * 0.47)))
    fine = fractal_noise(rng, 24, 8, 2)
    image = mix(deep, crest, 0.45 + 0.33 * ripple + 0.12 * fine)
    glint = smoothstep(ripple + 0.35 * fine, 0.85, 1.25)
    return mix(image, np.float32([0.95, 0.98, 1.0]), 0.8 * glint)


def leaves(rng: np.random.Generator) -> np.ndarray:
    """Overlapping pointed leaves with a bright midrib, each with its own green, over dark gaps."""
    cell = rng.uniform(8.5, 12.5)
    stamps = scattered_stamps(rng, cell, rng.uniform(1.9, 2.4))
    dark, bright = color(rng, (24, 66, 22), (30, 88, 34)), color(rng, (96, 160, 48), (140, 186, 70))
    image = mix(dark, bright, 0.15 + 0.5 * stamps["tone"] + 0.4 * stamps["depth"] * (0.6 - stamps["v"]))
    rib = np.exp(-((stamps["v"] * cell / 0.8) ** 2))
    image = mix(image, bright * 1.25, 0.55 * rib)
    gap = np.where(stamps["depth"] < 0, 1.0, smoothstep(0.25 - stamps["depth"], 0, 0.25) * 0.55)
    return mix(image, dark * 0.35, gap) + 0.02 * value_noise(rng, 48, 48)[..., None]


def grass(rng: np.random.Generator) -> np.ndarray:
    """Upright thin blades, bent by the wind, from dark ground to sunlit tips."""
    y, x = pixel_grid()
    dark, bright = color(rng, (30, 74, 20), (44, 98, 32)), color(rng, (132, 182, 62), (176, 206, 96))
    lean = rng.uniform(-0.25, 0.25)
    shift = ((SIZE - y) * lean + 2.5 * value_noise(rng, 5, 3)).astype(np.int64) + np.arange(SIZE)
    rows = np.arange(SIZE)[:, None]
    blades = value_noise(rng, 9, 48)[rows, shift % SIZE]
    fine = value_noise(rng, 16, 72)[rows, shift % SIZE]
    patch = value_noise(rng, 4, 5)
    image = mix(dark, bright, 0.42 + 0.26 * blades + 0.16 * fine + 0.10 * patch)
    return mix(image, dark * 0.4, smoothstep(-blades - 0.4 * fine, 0.9, 2.0))


def snow(rng: np.random.Generator) -> np.ndarray:
    """White drifts lit from one side, with bluish shadows and sparkles."""
    field = fractal_noise(rng, 3, 2, 3, 0.42)
    slope_y, slope_x = np.gradient(field)
    light = slope_x * float(rng.choice([-4, 4])) - slope_y * 5.0
    lit, shadow = color(rng, (236, 240, 248), (250, 248, 246)), color(rng, (150, 172, 208), (192, 198, 216))
    image = mix(shadow, lit, 0.62 + 0.75 * light)
    sparkle = smoothstep(value_noise(rng, 90, 90), 1.2, 2.0)
    return mix(image - 0.02 * value_noise(rng, 40, 40)[..., None], np.float32([1, 1, 1]), 0.8 * sparkle)


def sand(rng: np.random.Generator) -> np.ndarray:
    """Pale dunes with curved wind ripples and fine grain."""
    y, x = pixel_grid()
    lit, shadow = color(rng, (232, 206, 152), (244, 228, 194)), color(rng, (172, 132, 84), (198, 166, 124))
    warp = 5.0 * value_noise(rng, 2, 2) + 1.2 * value_noise(rng, 6, 6)
    angle = rng.uniform(-0.5, 0.5)
    phase = (y * math.cos(angle) + x * math.sin(angle) + warp) * (2 * np.pi / rng.uniform(6.5, 10.0))
    # A skewed sine: the windward slope is long, the lee side short.
    ripple = np.sin(phase + 0.6 * np.sin(phase))
    dune = value_noise(rng, 2, 2)
    image = mix(shadow, lit, 0.58 + 0.22 * ripple + 0.13 * dune)
    return image + 0.035 * rng.standard_normal((SIZE, SIZE, 1), dtype=np.float32)


def flowers(rng: np.random.Generator) -> np.ndarray:
    """Round five-petalled blossoms in warm colours with yellow hearts, over a dark green bed."""
    cell = rng.uniform(10.0, 14.0)
    bed = mix(
        color(rng, (28, 62, 26), (52, 86, 34)),
        color(rng, (84, 130, 48), (110, 150, 60)),
        0.4 + 0.3 * value_noise(rng, 20, 20),
    )
    stamps = scattered_stamps(rng, cell, 1.0)
    radius, theta = np.hypot(stamps["u"], stamps["v"]), np.arctan2(stamps["v"], stamps["u"])
    edge = 0.60 + 0.19 * np.cos(5 * theta + 6.28 * stamps["tone"])
    first, second = color(rng, (206, 40, 70), (250, 120, 40)), color(rng, (244, 150, 190), (255, 214, 90))
    petal = (
        mix(first, second, stamps["tone"] * 1.3 - 0.15) * (0.72 + 0.5 * radius + 0.12 * np.cos(10 * theta))[..., None]
    )
    image = mix(bed, petal, smoothstep(edge - radius, 0.0, 0.10) * (stamps["depth"] >= 0))
    return mix(
        image,
        color(rng, (248, 200, 50), (255, 226, 110)),
        smoothstep(0.22 - radius, 0, 0.06) * (stamps["depth"] >= 0),
    )


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
