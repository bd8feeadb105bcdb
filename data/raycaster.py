"""A batched ray caster in torch: spheres, rotated boxes and capped cylinders on a ground plane, CPU or CUDA.

Every scene of a batch is traced at once; compiled, the whole picture is a handful of fused loops. A scene is the dict
of tensors that sample_scenes returns. World frame: x right, y away from the camera, z up, ground at z = 0. Camera
frame: x right, y up, z towards the viewer. Vectors are tuples of three (B, P) tensors, P rays a scene: separate
components fuse better than a last dimension of three.
"""
import math
import shutil

import torch
import torch.nn.functional as F

SHAPES = ("cube", "sphere", "cylinder")
COLORS = {"gray": (87, 87, 87), "red": (173, 35, 35), "blue": (42, 75, 215), "green": (29, 125, 20),
          "brown": (129, 74, 25), "purple": (129, 38, 192), "cyan": (41, 208, 208), "yellow": (255, 238, 51)}
MATERIALS = ("rubber", "metal")
SIZES = ("small", "large")
SEG_PALETTE = ((24, 26, 32), (235, 94, 85), (76, 161, 242), (250, 200, 80))  # ground, then SHAPES
HALF = (0.74, 0.92, 0.80)  # of an object's radius: cube half side, sphere radius, cylinder radius and half height
MAX_OBJECTS = 4
FOV = math.radians(5.84)  # a long lens: next to no perspective
NEAR, FAR = 52.0, 67.0  # z-depths drawn as 1 and 0: pictures of depth are linear in 1 / z, as a ground plane is
RENDER_BATCH = 50  # scenes rendered at once


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
    """Image position (x right, y down, both in [0, 1]) and z-depth of every object's centre: three (B, 4) tensors."""
    origin, right, up, forward = camera_frame(scenes)
    offset = scenes["center"] - origin[:, None]  # (B, 4, 3)
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


def intersect(scenes, k, o, d):
    """Ray parameter t (inf: no hit) and world normal (three (B, P)) of the rays' first hit with object k."""
    column = lambda name: scenes[name][:, k, None]
    cos, sin, shape = column("theta").cos(), column("theta").sin(), column("shape")
    half = column("radius") * torch.where(shape == 0, HALF[0], torch.where(shape == 1, HALF[1], HALF[2]))
    p = [o[c] - scenes["center"][:, k, c, None] for c in range(3)]
    px, py, pz = cos * p[0] + sin * p[1], cos * p[1] - sin * p[0], p[2]  # into the object's frame
    dx, dy, dz = cos * d[0] + sin * d[1], cos * d[1] - sin * d[0], d[2]
    # slabs |x|, |y|, |z| < half: entry and exit per axis
    safe = lambda v: torch.where(v.abs() < 1e-9, 1e-9, v)
    ix, iy, iz = 1 / safe(dx), 1 / safe(dy), 1 / safe(dz)
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


def trace(scenes, o, d):
    """Nearest hit of the rays o + t d: t, object index (-1: ground), both (B, P), and world normals."""
    t = torch.where(d[2] < -1e-4, -o[2] / d[2].clamp(max=-1e-4), 1e4)
    ids = torch.full_like(t, -1)
    n = [torch.zeros_like(t), torch.zeros_like(t), torch.ones_like(t)]
    for k in range(MAX_OBJECTS):
        tk, nk = intersect(scenes, k, o, d)
        closer = tk < t
        t, ids = torch.where(closer, tk, t), torch.where(closer, float(k), ids)
        n = [torch.where(closer, new, old) for new, old in zip(nk, n)]
    return t, ids, n


def shade(scenes, d, p, ids, n):
    """rgb in [0, 1] (three (B, P)) at points p seen along d: Lambert, Blinn-Phong, a hard shadow, a sky in metal."""
    lamp = [scenes["lamp"][:, c, None].expand_as(ids) for c in range(3)]
    lifted = [p[c] + 1e-3 * n[c] for c in range(3)]
    lit = torch.ones_like(ids)
    for k in range(MAX_OBJECTS):
        lit = torch.where(intersect(scenes, k, lifted, lamp)[0] < math.inf, 0.0, lit)
    palette = torch.tensor(list(COLORS.values()), device=ids.device).float() / 255
    ground = ids < 0
    color, metal = [torch.full_like(ids, 0.52) for _ in range(3)], torch.zeros_like(ids)
    for k in range(MAX_OBJECTS):
        mine = ids == k
        albedo = palette[scenes["color"][:, k].clamp(min=0)]  # (B, 3)
        color = [torch.where(mine, albedo[:, c, None], color[c]) for c in range(3)]
        metal = torch.where(mine, (scenes["material"][:, k, None] == 1).float(), metal)
    facing = dot(n, lamp)
    half = [lamp[c] - d[c] for c in range(3)]
    gloss = (dot(n, half) * torch.rsqrt(dot(half, half))).clamp(min=0)
    shine = torch.where(ground, 0.0, torch.where(metal > 0, 0.9 * gloss ** 48, 0.25 * gloss ** 16)) * lit * (facing > 0)
    mirrored = d[2] - 2 * dot(d, n) * n[2]  # height of the reflected ray: sky above, floor below
    sky = torch.where(mirrored > 0, 0.55 + 0.9 * mirrored, 0.30 + 0.25 * mirrored)
    light = 0.58 + 0.12 * n[2] + 0.46 * facing.clamp(min=0) * lit
    light = torch.where(metal > 0, 0.5 * light + 0.75 * sky, light)
    fade = torch.where(ground, 1 / (1 + 0.004 * (p[0] * p[0] + p[1] * p[1])), 1.0)
    return [(color[c] * light * fade + shine).clamp(0, 1) for c in range(3)]


def render_samples(scenes, pixels):
    """One sample a pixel: rgb (B, 3, P), z-depth (B, P), camera-space normals (B, 3, P), object index (B, P)."""
    o, d = primary_rays(scenes, pixels)
    t, ids, n = trace(scenes, o, d)
    p = [o[c] + t * d[c] for c in range(3)]
    rgb = torch.stack(shade(scenes, d, p, ids, n), 1)
    _, right, up, forward = camera_frame(scenes)
    along = lambda axis, v: sum(axis[:, c, None] * v[c] for c in range(3))
    return rgb, t * along(forward, d), torch.stack([along(right, n), along(up, n), -along(forward, n)], 1), ids


def shifts(x, reach):
    """Views of x (B, H, W) moved by (i, j), its border repeated: a function of i and j in -reach..reach."""
    H, W = x.shape[1:]
    padded = F.pad(x[:, None], (reach,) * 4, mode="replicate")[:, 0]
    return lambda i, j: padded[:, reach + i:reach + i + H, reach + j:reach + j + W]


def canny(rgb):
    """Canny edges, 0 or 1, (B, H, W), of (B, 3, H, W): blur, Sobel, non-maximum suppression, hysteresis."""
    at = shifts(0.299 * rgb[:, 0] + 0.587 * rgb[:, 1] + 0.114 * rgb[:, 2], 2)
    at = shifts((at(0, -2) + 4 * at(0, -1) + 6 * at(0, 0) + 4 * at(0, 1) + at(0, 2)) / 16, 2)
    at = shifts((at(-2, 0) + 4 * at(-1, 0) + 6 * at(0, 0) + 4 * at(1, 0) + at(2, 0)) / 16, 1)
    gx = at(-1, 1) + 2 * at(0, 1) + at(1, 1) - at(-1, -1) - 2 * at(0, -1) - at(1, -1)
    gy = at(1, -1) + 2 * at(1, 0) + at(1, 1) - at(-1, -1) - 2 * at(-1, 0) - at(-1, 1)
    magnitude = (gx * gx + gy * gy).sqrt()
    at = shifts(magnitude, 1)
    steep, diagonal = gy.abs() / (gx.abs() + 1e-9), gx * gy > 0
    thin = torch.zeros_like(magnitude, dtype=torch.bool)
    for sector, (i, j) in ((steep < 0.4142, (0, 1)), (steep > 2.4142, (1, 0)),
                           ((steep >= 0.4142) & (steep <= 2.4142) & diagonal, (1, 1)),
                           ((steep >= 0.4142) & (steep <= 2.4142) & ~diagonal, (1, -1))):
        thin |= sector & (magnitude >= at(i, j)) & (magnitude > at(-i, -j))
    weak, strong = (thin & (magnitude > 0.10)).float(), (thin & (magnitude > 0.30)).float()
    for _ in range(6):  # strong edges grow along weak ones
        strong = weak * F.max_pool2d(strong[:, None], 3, 1, 1)[:, 0]
    return strong


def render_batch(scenes, size):
    """Pictures in [0, 1] from 2x2 samples a pixel, each (B, 3, size, size), and the object index (B, size, size)."""
    rgb, z, normals, ids = render_samples(scenes, 2 * size)
    B = rgb.shape[0]
    grid = lambda x: x.view(B, -1, 2 * size, 2 * size)
    pool = lambda x: F.avg_pool2d(grid(x), 2)
    depth = (1 / pool(z) - 1 / FAR) / (1 / NEAR - 1 / FAR)
    votes = torch.stack([pool((ids == k).float())[:, 0] for k in range(-1, MAX_OBJECTS)])
    index = votes.argmax(0) - 1  # what most samples hit
    kind = torch.cat([torch.zeros_like(scenes["shape"][:, :1]), scenes["shape"] + 1], 1)  # of index + 1: ground, SHAPES
    kind = kind.gather(1, index.flatten(1) + 1).view_as(index)
    palette = torch.tensor(SEG_PALETTE, device=z.device).float() / 255
    edge = (F.avg_pool2d(canny(grid(rgb))[:, None], 2) * 2).clamp(max=1)
    return {"rgb": pool(rgb), "depth": depth.clamp(0, 1).expand(B, 3, size, size),
            "normal": (F.normalize(pool(normals), dim=1) + 1) / 2,
            "seg": palette[kind].permute(0, 3, 1, 2), "edge": edge.expand(B, 3, size, size), "index": index}


_compiled = {}


def render(scenes, size=64, compiled=True):
    """Pictures of every scene: dict of (B, 3, size, size) floats in [0, 1] by modality, and index (B, size, size).

    rgb, depth (linear in 1 / z, nearer is brighter), normal (camera space, (n + 1) / 2), seg (SEG_PALETTE) and edge.
    """
    device = scenes["lamp"].device
    once = render_batch
    if compiled and (device.type == "cuda" or shutil.which("g++") or shutil.which("clang++")):
        once = _compiled.setdefault(device.type, torch.compile(render_batch, dynamic=False))
    n, parts = scenes["lamp"].shape[0], []
    for i in range(0, n, RENDER_BATCH):
        rows = torch.arange(i, i + RENDER_BATCH, device=device).clamp(max=n - 1)  # one shape: nothing recompiles
        batch = {name: value[rows] for name, value in scenes.items()}
        images = once(batch, size)
        parts.append({name: image[:n - i] for name, image in images.items()})
    joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return joined, joined.pop("index")
