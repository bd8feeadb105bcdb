"""A batched ray caster in torch: spheres, rotated boxes and capped cylinders on a ground plane, CPU or CUDA.

Every scene of a batch is traced at once; compiled, the whole picture is a handful of fused loops. A scene is the dict
of tensors that sample_scenes returns. World frame: x right, y away from the camera, z up, ground at z = 0. Camera
frame: x right, y up, z towards the viewer. Vectors are tuples of three (B, P) tensors, P rays per scene: separate
components fuse better than a last dimension of three.
"""
import functools
import math
import os
import tempfile
import time

import torch
import torch.nn.functional as F

SHAPES = ("cube", "sphere", "cylinder")
COLORS = {"gray": (87, 87, 87), "red": (173, 35, 35), "blue": (42, 75, 215), "green": (29, 125, 20),
          "brown": (129, 74, 25), "purple": (129, 38, 192), "cyan": (41, 208, 208), "yellow": (255, 238, 51)}
MATERIALS = ("rubber", "metal")
SIZES = ("small", "large")
SEG_PALETTE = ((24, 26, 32), (235, 94, 85), (76, 161, 242), (250, 200, 80))  # ground, then SHAPES
HALF = (0.78, 0.95, 0.86)  # of an object's radius: cube half side, sphere radius, cylinder radius and half height
MAX_OBJECTS = 3
FOV = math.radians(5.84)  # a long lens: next to no perspective
NEAR, FAR = 52.0, 67.0  # z-depths drawn as 1 and 0: pictures of depth are linear in 1 / z, as a ground plane is
RENDER_BATCH = {"cpu": 20, "cuda": 50}  # scenes at once: the rays of 20 fit the cache of a core, 20 % faster than 50


# ------------------------------------------------------------------------------------------------------------
# Rays and surfaces

def camera_frame(scenes):
    """Position and axes of each scene's camera: (B, 3) tensors origin, right, up, forward."""
    azimuth, elevation, distance = scenes["camera"].unbind(1)
    zero = torch.zeros_like(azimuth)
    outward = torch.stack([azimuth.sin() * elevation.cos(), -azimuth.cos() * elevation.cos(), elevation.sin()], 1)
    target = torch.stack([zero, zero, zero + 0.4], 1)
    right = torch.stack([azimuth.cos(), azimuth.sin(), zero], 1)
    return target + distance[:, None] * outward, right, torch.linalg.cross(outward, right), -outward


def project(scenes):
    """Image position (x right, y down, both in [0, 1]) and z-depth of every object's centre: three (B, K) tensors."""
    origin, right, up, forward = camera_frame(scenes)
    offset = scenes["center"] - origin[:, None]  # (B, K, 3)
    x, y, z = (torch.einsum("bkc,bc->bk", offset, axis) for axis in (right, up, forward))
    scale = 2 * math.tan(FOV / 2) * z
    return 0.5 + x / scale, 0.5 - y / scale, z


def unproject(scenes, x, y, height):
    """Where the camera rays through image positions x, y (B, N) reach a height (B, 1) above ground: (B, N, 3)."""
    origin, right, up, forward = (axis[:, None] for axis in camera_frame(scenes))
    reach = 2 * math.tan(FOV / 2)
    d = forward + reach * ((x - 0.5)[..., None] * right + (0.5 - y)[..., None] * up)
    return origin + ((height - origin[..., 2]) / d[..., 2])[..., None] * d


def dot(a, b):
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def primary_rays(scenes, pixels):
    """Camera rays through the centres of pixels x pixels: origin (three (B, 1)) and unit directions (three (B, P))."""
    origin, right, up, forward = camera_frame(scenes)
    grid = ((torch.arange(pixels, device=origin.device) + 0.5) / pixels * 2 - 1) * math.tan(FOV / 2)
    x, y = grid.repeat(pixels), -grid.repeat_interleave(pixels)
    d = [forward[:, c, None] + x * right[:, c, None] + y * up[:, c, None] for c in range(3)]
    norm = torch.rsqrt(dot(d, d))
    return tuple(origin[:, c, None] for c in range(3)), tuple(c * norm for c in d)


def object_at(scenes, k):
    """What a ray needs to know of the objects in slot k: dict of (B, 1) tensors; center is three of them."""
    columns = {name: scenes[name][:, k, None] for name in ("shape", "theta", "radius")}
    center = tuple(scenes["center"][:, k, c, None] for c in range(3))
    return {**columns, "center": center, "slot": torch.full_like(columns["theta"], k)}


def intersect(solid, o, d):
    """Ray parameter t (inf: no hit) and world normal (three (B, P)) of the rays' first hit with objects of one slot."""
    cos, sin, shape = solid["theta"].cos(), solid["theta"].sin(), solid["shape"]
    half = solid["radius"] * torch.where(shape == 0, HALF[0], torch.where(shape == 1, HALF[1], HALF[2]))
    p = [o[c] - solid["center"][c] for c in range(3)]
    px, py, pz = cos * p[0] + sin * p[1], cos * p[1] - sin * p[0], p[2]  # into the object's frame
    dx, dy, dz = cos * d[0] + sin * d[1], cos * d[1] - sin * d[0], d[2]
    # slabs |x|, |y|, |z| < half: entry and exit per axis
    ix, iy, iz = (1 / torch.where(v.abs() < 1e-9, 1e-9, v) for v in (dx, dy, dz))
    x0, y0, z0 = (-half * i.abs() - q * i for q, i in ((px, ix), (py, iy), (pz, iz)))
    x1, y1, z1 = (half * i.abs() - q * i for q, i in ((px, ix), (py, iy), (pz, iz)))
    # quadratics |p + t d| = half, in three dimensions for the sphere, in x and y for the cylinder's side
    zs = (shape == 1).float()
    a = dx * dx + dy * dy + zs * dz * dz + 1e-12
    b = px * dx + py * dy + zs * pz * dz
    disc = b * b - a * (px * px + py * py + zs * pz * pz - half * half)
    root = disc.clamp(min=0).sqrt()
    q0 = torch.where(disc > 0, (-b - root) / a, math.inf)
    q1 = torch.where(disc > 0, (-b + root) / a, -math.inf)
    cube, ball = shape == 0, shape == 1
    side0 = torch.where(cube, torch.maximum(x0, y0), q0)
    side1 = torch.where(cube, torch.minimum(x1, y1), q1)
    t0 = torch.where(ball, q0, torch.maximum(side0, z0))
    t1 = torch.where(ball, q1, torch.minimum(side1, z1))
    t = torch.where((t0 < t1) & (t0 > 0) & (shape >= 0), t0, math.inf)
    # the normal of the surface entered last
    hit = torch.where(t < math.inf, t, 0.0)
    cap = ~ball & (z0 > side0)
    flat = (~cap).float() / half
    nx, ny = (px + hit * dx) * flat, (py + hit * dy) * flat
    nx = torch.where(cube, torch.where((x0 > y0) & ~cap, -torch.sign(dx), 0.0), nx)
    ny = torch.where(cube, torch.where((x0 <= y0) & ~cap, -torch.sign(dy), 0.0), ny)
    nz = torch.where(ball, (pz + hit * dz) / half, torch.where(cap, -torch.sign(dz), 0.0))
    return t, (cos * nx - sin * ny, sin * nx + cos * ny, nz)


def hit_ground(o, d):
    """The rays' hits with the ground, t (1e4: none) and object index -1, both (B, P), and world normals."""
    t = torch.where(d[2] < -1e-4, -o[2] / d[2].clamp(max=-1e-4), 1e4)
    return t, torch.full_like(t, -1), (torch.zeros_like(t), torch.zeros_like(t), torch.ones_like(t))


def hit_slot(solid, o, d, t, ids, n):
    """The nearer one of the hits so far and of those with the objects of one slot."""
    new_t, new_n = intersect(solid, o, d)
    closer = new_t < t
    t = torch.where(closer, new_t, t)
    ids = torch.where(closer, solid["slot"], ids)
    return t, ids, tuple(torch.where(closer, new, old) for new, old in zip(new_n, n))


def shade_slot(solid, p, lamp, lit):
    """What is left of the light (B, P), 0 or 1, at points p once the objects of one slot stand in its way."""
    return torch.where(intersect(solid, p, lamp)[0] < math.inf, 0.0, lit)


def occupied(scenes):
    """The slots in which any scene of the batch has an object, as object_at gives them."""
    used = (scenes["shape"] >= 0).any(0).tolist()
    return [object_at(scenes, k) for k, there in enumerate(used) if there]


def trace(scenes, o, d):
    """Nearest hit of the rays o + t d: t, object index (-1: ground), both (B, P), and world normals."""
    hit = hit_ground(o, d)
    for solid in occupied(scenes):
        hit = hit_slot(solid, o, d, *hit)
    return hit


def shade(scenes, d, ids, n, lamp, lit):
    """rgb in [0, 1] (three (B, P)) of what is seen along d: Lambert, Blinn-Phong, a hard shadow, a sky in metal."""
    ground = ids < 0
    slot = ids.long().clamp(min=0)
    palette = torch.tensor(list(COLORS.values()), device=ids.device).float() / 255
    albedo = palette[scenes["color"].clamp(min=0)]  # (B, K, 3)
    color = [torch.where(ground, 0.52, albedo[:, :, c].gather(1, slot)) for c in range(3)]
    metal = torch.where(ground, 0.0, (scenes["material"] == 1).float().gather(1, slot))
    facing = dot(n, lamp)
    half = [lamp[c] - d[c] for c in range(3)]
    gloss = (dot(n, half) * torch.rsqrt(dot(half, half))).clamp(min=0)
    shine = torch.where(ground, 0.0, torch.where(metal > 0, 0.9 * gloss ** 48, 0.25 * gloss ** 16)) * lit * (facing > 0)
    mirrored = d[2] - 2 * dot(d, n) * n[2]  # height of the reflected ray: sky above, floor below
    sky = torch.where(mirrored > 0, 0.55 + 0.9 * mirrored, 0.40 + 0.25 * mirrored)
    light = 0.58 + 0.12 * n[2] + 0.46 * facing.clamp(min=0) * lit
    light = torch.where(metal > 0, 0.5 * light + 0.75 * sky, light)
    return [(color[c] * light + shine).clamp(0, 1) for c in range(3)]


def as_it_is(function):
    return function


def start_rays(scenes, pixels):
    """Camera rays and their hits with the ground: o, d and what hit_ground returns."""
    o, d = primary_rays(scenes, pixels)
    return o, d, hit_ground(o, d)


def leave_surface(scenes, o, d, t, n):
    """Where shadow rays start, just above the surface, the lamp's direction (B, 1), and light for all."""
    lifted = tuple(o[c] + t * d[c] + 1e-3 * n[c] for c in range(3))
    lamp = tuple(scenes["lamp"][:, c, None] for c in range(3))
    return lifted, lamp, torch.ones_like(t)


def finish_rays(scenes, d, t, ids, n, lamp, lit):
    """Colours (B, 3, P), z-depth (B, P) and camera-space normals (B, 3, P) of the rays' hits."""
    _, right, up, forward = camera_frame(scenes)

    def along(axis, v):
        return sum(axis[:, c, None] * v[c] for c in range(3))

    rgb = torch.stack(shade(scenes, d, ids, n, lamp, lit), 1)
    return rgb, t * along(forward, d), torch.stack([along(right, n), along(up, n), -along(forward, n)], 1)


def render_samples(scenes, pixels, part=as_it_is):
    """One sample per pixel: rgb (B, 3, P), z-depth (B, P), camera-space normals (B, 3, P), object index (B, P).

    part: how to run its parts, `compiled` or `as_it_is`. Each slot of objects is a part: compiling the whole function at
    once takes 53 s of a core in place of 28, and computes slots that no scene of the batch has an object in.
    """
    o, d, hit = part(start_rays)(scenes, pixels)
    solids = occupied(scenes)
    for solid in solids:
        hit = part(hit_slot)(solid, o, d, *hit)
    t, ids, n = hit
    lifted, lamp, lit = part(leave_surface)(scenes, o, d, t, n)
    for solid in solids:
        lit = part(shade_slot)(solid, lifted, lamp, lit)
    return *part(finish_rays)(scenes, d, t, ids, n, lamp, lit), ids


def pad(x, reach):
    """x (B, ..., H, W) with its border repeated. Never inside a compiled part: it would be computed at every use."""
    return F.pad(x, (reach,) * 4, mode="replicate")


def shifts(padded, reach):
    """Views of a padded x moved by (i, j): a function of i and j in -reach..reach."""
    H, W = padded.shape[-2] - 2 * reach, padded.shape[-1] - 2 * reach

    def at(i, j):
        return padded[..., reach + i:reach + i + H, reach + j:reach + j + W]
    return at


def blur_across(padded):
    """Luma (B, H, W), blurred from left to right, of padded rgb (B, 3, H + 4, W + 4)."""
    at = shifts(0.299 * padded[:, 0] + 0.587 * padded[:, 1] + 0.114 * padded[:, 2], 2)
    return (at(0, -2) + 4 * at(0, -1) + 6 * at(0, 0) + 4 * at(0, 1) + at(0, 2)) / 16


def blur_down(padded):
    at = shifts(padded, 2)
    return (at(-2, 0) + 4 * at(-1, 0) + 6 * at(0, 0) + 4 * at(1, 0) + at(2, 0)) / 16


def sobel(padded):
    """Magnitude of the gradient and its two components."""
    at = shifts(padded, 1)
    gx = at(-1, 1) + 2 * at(0, 1) + at(1, 1) - at(-1, -1) - 2 * at(0, -1) - at(1, -1)
    gy = at(1, -1) + 2 * at(1, 0) + at(1, 1) - at(-1, -1) - 2 * at(-1, 0) - at(-1, 1)
    return (gx * gx + gy * gy).sqrt(), gx, gy


def thin(padded, gx, gy):
    """Weak and strong edges, bool: where the padded magnitude is a maximum along the gradient."""
    at = shifts(padded, 1)
    magnitude = at(0, 0)
    steep, diagonal = gy.abs() / (gx.abs() + 1e-9), gx * gy > 0
    peak = torch.zeros_like(diagonal)
    for sector, (i, j) in ((steep < 0.4142, (0, 1)), (steep > 2.4142, (1, 0)),
                           ((steep >= 0.4142) & (steep <= 2.4142) & diagonal, (1, 1)),
                           ((steep >= 0.4142) & (steep <= 2.4142) & ~diagonal, (1, -1))):
        peak |= sector & (magnitude >= at(i, j)) & (magnitude > at(-i, -j))
    return peak & (magnitude > 0.10), peak & (magnitude > 0.30)


def neighbourhood(mask):
    """Where a mask (B, H, W) or one of a pixel's eight neighbours is set."""
    across = mask.clone()
    across[:, :, 1:] |= mask[:, :, :-1]
    across[:, :, :-1] |= mask[:, :, 1:]
    around = across.clone()
    around[:, 1:] |= across[:, :-1]
    around[:, :-1] |= across[:, 1:]
    return around


def canny(rgb, part=as_it_is):
    """Canny edges, 0 or 1, (B, H, W), of (B, 3, H, W): blur, Sobel, non-maximum suppression, hysteresis."""
    blurred = part(blur_across)(pad(rgb, 2))
    blurred = part(blur_down)(pad(blurred[:, None], 2)[:, 0])
    magnitude, gx, gy = part(sobel)(pad(blurred[:, None], 1)[:, 0])
    weak, strong = part(thin)(pad(magnitude[:, None], 1)[:, 0], gx, gy)
    for _ in range(6):  # strong edges grow along weak ones
        strong = weak & neighbourhood(strong)
    return strong.float()


def average_samples(scenes, size, rgb, z, normals, ids, edge):
    """Pictures in [0, 1] of 2 x 2 samples per pixel, as render_batch returns them."""
    B = rgb.shape[0]

    def pool(x):
        return F.avg_pool2d(x.view(B, -1, 2 * size, 2 * size), 2)

    depth = (1 / pool(z) - 1 / FAR) / (1 / NEAR - 1 / FAR)
    votes = torch.stack([pool((ids == k).float())[:, 0] for k in range(-1, scenes["shape"].shape[1])])
    index = votes.argmax(0) - 1  # what most samples hit
    kind = torch.cat([torch.zeros_like(scenes["shape"][:, :1]), scenes["shape"] + 1], 1)  # of index + 1: ground, SHAPES
    kind = kind.gather(1, index.flatten(1) + 1).view_as(index)
    palette = torch.tensor(SEG_PALETTE, device=z.device).float() / 255
    edge = (F.avg_pool2d(edge[:, None], 4, 2, 1) * 3).clamp(max=1)  # soft lines, two pixels wide, fit into few tokens
    return {"rgb": pool(rgb), "depth": depth.clamp(0, 1).expand(B, 3, size, size),
            "normal": (F.normalize(pool(normals), dim=1) + 1) / 2,
            "seg": palette[kind].permute(0, 3, 1, 2), "edge": edge.expand(B, 3, size, size), "index": index}


def render_batch(scenes, size, part=as_it_is):
    """Pictures in [0, 1] from 2x2 samples per pixel, each (B, 3, size, size), and the object index (B, size, size)."""
    rgb, z, normals, ids = render_samples(scenes, 2 * size, part)
    edge = canny(rgb.unflatten(2, (2 * size, 2 * size)), part)
    return part(average_samples)(scenes, size, rgb, z, normals, ids, edge)


@functools.cache
def can_compile():
    """Whether torch.compile works on this CPU, tried on one line. On a GPU it is not worth two minutes of compiling."""
    # torch would take up what it compiled for another CPU with this cache, and compute NaN with it
    name = f"torchinductor_{os.environ.get('USER', '')}_{torch.backends.cpu.get_cpu_capability()}"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", os.path.join(tempfile.gettempdir(), name))
    try:
        new = time.time_ns()  # in no cache: what is cached needs no compiler
        torch.compile(lambda x: x + new)(torch.zeros(1))
    except Exception:  # torch.compile has many kinds
        return False
    return True


@functools.cache
def compiled(function):
    return torch.compile(function, dynamic=False)


def render(scenes, size=64, compile=True):
    """Pictures of every scene: dict of (B, 3, size, size) floats in [0, 1] by modality, and index (B, size, size).

    rgb, depth (linear in 1 / z, nearer is brighter), normal (camera space, (n + 1) / 2), seg (SEG_PALETTE) and edge.
    """
    device = scenes["lamp"].device
    part = compiled if compile and device.type == "cpu" and can_compile() else as_it_is
    n = len(scenes["lamp"])
    batch_size = RENDER_BATCH[device.type]
    order = (scenes["shape"] >= 0).sum(1).argsort(stable=True)  # scenes with few objects together: fewer slots to trace
    images = {}
    for i in range(0, n, batch_size):
        rows = order[torch.arange(i, i + batch_size, device=device).clamp(max=n - 1)]  # one shape: nothing recompiles
        batch = {name: value[rows] for name, value in scenes.items()}
        for name, values in render_batch(batch, size, part).items():
            if name not in images:
                images[name] = values.new_empty(n, *values.shape[1:])
            images[name][rows] = values
    return images, images.pop("index")
