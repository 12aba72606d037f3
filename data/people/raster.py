"""Triangle rasterisers in numba: a z-buffer for pictures, and a plain one that bakes values into a texture.

Both are single-threaded and use no fast-math, so equal inputs give equal bytes.
"""

import numpy as np

from viewdiff_nb.files import install_hint

try:
    from numba import njit
except ImportError as error:
    raise ImportError(f"drawing heads needs numba: {install_hint('heads')}") from error

# Triangles with less than this doubled area, in square pixels, are seen edge-on and cover no pixel.
SMALLEST_DOUBLED_AREA = 1e-9
# How far light wraps around the terminator: skin scatters light, so its shadow edge is soft.
LIGHT_WRAP = 0.25
SHININESS = 18.0


@njit(cache=True)
def pixel_range(a, b, c, size):
    """First and last pixel (inclusive) whose centre lies within the span of three coordinates."""
    first = int(np.ceil(min(a, b, c) - 0.5))
    last = int(np.floor(max(a, b, c) - 0.5))
    return max(0, first), min(size - 1, last)


@njit(cache=True)
def bake_attributes(uv, attributes, faces, size):
    """Spread per-vertex values over the texture that a UV map describes.

    Args:
        uv: (V, 2) float64 texture coordinates in 0..1.
        attributes: (V, C) float64 values at the vertices.
        faces: (T, 3) vertex indices.
        size: side of the square texture, in texels.

    Returns:
        (size, size, C) interpolated values, row 0 at v = 0, and the (size, size) index of the face
        that covers each texel, -1 where none does.
    """
    channels = attributes.shape[1]
    values = np.zeros((size, size, channels))
    owner = np.full((size, size), -1, np.int32)
    for face in range(faces.shape[0]):
        a, b, c = faces[face, 0], faces[face, 1], faces[face, 2]
        xa, ya = uv[a, 0] * size, uv[a, 1] * size
        xb, yb = uv[b, 0] * size, uv[b, 1] * size
        xc, yc = uv[c, 0] * size, uv[c, 1] * size
        doubled_area = (xb - xa) * (yc - ya) - (xc - xa) * (yb - ya)
        if abs(doubled_area) < SMALLEST_DOUBLED_AREA:
            continue
        left, right = pixel_range(xa, xb, xc, size)
        top, bottom = pixel_range(ya, yb, yc, size)
        for y in range(top, bottom + 1):
            for x in range(left, right + 1):
                dx, dy = x + 0.5 - xa, y + 0.5 - ya
                wb = (dx * (yc - ya) - (xc - xa) * dy) / doubled_area
                wc = ((xb - xa) * dy - dx * (yb - ya)) / doubled_area
                wa = 1.0 - wb - wc
                if wa < 0 or wb < 0 or wc < 0:
                    continue
                owner[y, x] = face
                for channel in range(channels):
                    values[y, x, channel] = (
                        wa * attributes[a, channel] + wb * attributes[b, channel] + wc * attributes[c, channel]
                    )
    return values, owner


@njit(cache=True)
def draw_mesh(canvas, screen, distance, normals, uv, faces, texture, light, colour, ambient, gloss):
    """Draw a textured, lit mesh over a background, in place, nearest surface on top.

    Args:
        canvas: (S, S, 3) float32 linear RGB in 0..1; holds the background.
        screen: (V, 2) float64 positions in canvas pixels, x right, y down.
        distance: (V,) float64 distance of each vertex from the camera plane, > 0.
        normals: (V, 3) float64 unit normals, x right, y down, z toward the camera.
        uv: (V, 2) float64 texture coordinates in 0..1.
        faces: (T, 3) vertex indices, any winding.
        texture: (H, H, 3) float32 linear RGB.
        light: (3,) unit vector toward the light.
        colour: (3,) RGB of the light.
        ambient: share of light that comes from everywhere, 0..1.
        gloss: strength of the highlight.
    """
    size = canvas.shape[0]
    texels = texture.shape[0]
    nearness = np.zeros((size, size))  # 1 / distance: linear in the picture, larger is nearer
    half = np.array([light[0], light[1], light[2] + 1.0])
    half /= np.sqrt((half**2).sum())
    for face in range(faces.shape[0]):
        a, b, c = faces[face, 0], faces[face, 1], faces[face, 2]
        xa, ya = screen[a, 0], screen[a, 1]
        xb, yb = screen[b, 0], screen[b, 1]
        xc, yc = screen[c, 0], screen[c, 1]
        doubled_area = (xb - xa) * (yc - ya) - (xc - xa) * (yb - ya)
        if abs(doubled_area) < SMALLEST_DOUBLED_AREA:
            continue
        left, right = pixel_range(xa, xb, xc, size)
        top, bottom = pixel_range(ya, yb, yc, size)
        for y in range(top, bottom + 1):
            for x in range(left, right + 1):
                dx, dy = x + 0.5 - xa, y + 0.5 - ya
                wb = (dx * (yc - ya) - (xc - xa) * dy) / doubled_area
                wc = ((xb - xa) * dy - dx * (yb - ya)) / doubled_area
                wa = 1.0 - wb - wc
                if wa < 0 or wb < 0 or wc < 0:
                    continue
                wa, wb, wc = wa / distance[a], wb / distance[b], wc / distance[c]
                near = wa + wb + wc
                if near <= nearness[y, x]:
                    continue
                nearness[y, x] = near
                wa, wb, wc = wa / near, wb / near, wc / near  # perspective-correct weights
                nx = wa * normals[a, 0] + wb * normals[b, 0] + wc * normals[c, 0]
                ny = wa * normals[a, 1] + wb * normals[b, 1] + wc * normals[c, 1]
                nz = wa * normals[a, 2] + wb * normals[b, 2] + wc * normals[c, 2]
                length = np.sqrt(nx * nx + ny * ny + nz * nz) + 1e-12
                nx, ny, nz = nx / length, ny / length, nz / length
                facing = nx * light[0] + ny * light[1] + nz * light[2]
                diffuse = max((facing + LIGHT_WRAP) / (1.0 + LIGHT_WRAP), 0.0) * (1.0 - ambient) * (1.0 + LIGHT_WRAP)
                sky = ambient * (0.75 - 0.25 * ny)  # more of it from above
                shine = gloss * max(nx * half[0] + ny * half[1] + nz * half[2], 0.0) ** SHININESS
                u = (wa * uv[a, 0] + wb * uv[b, 0] + wc * uv[c, 0]) * texels - 0.5
                v = (wa * uv[a, 1] + wb * uv[b, 1] + wc * uv[c, 1]) * texels - 0.5
                column = min(max(int(u), 0), texels - 2)
                row = min(max(int(v), 0), texels - 2)
                fu, fv = u - column, v - row
                for channel in range(3):
                    upper = texture[row, column, channel] * (1 - fu) + texture[row, column + 1, channel] * fu
                    lower = texture[row + 1, column, channel] * (1 - fu) + texture[row + 1, column + 1, channel] * fu
                    albedo = upper * (1 - fv) + lower * fv
                    lit = albedo * (sky + diffuse * colour[channel]) + shine * colour[channel]
                    canvas[y, x, channel] = min(max(lit, 0.0), 1.0)
