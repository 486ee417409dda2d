"""The same meta-gradient in JAX, jitted: the networks written out, weights taken from the torch module.

Images are laid out (examples, height, width, channels) and kernels (h, w, in, out), which XLA prefers on
a CPU; both are turned around before the clock starts.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.workloads import Setup


def run(setup: Setup, over_tasks: str):
    """Setup → (run, read), see contestants.py. over_tasks: "vmap", "map" (`lax.map`, one program that walks
    over the tasks) or "loop" (a Python loop over one task's program).
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    if next(setup.model.parameters()).dtype == torch.float64:
        jax.config.update("jax_enable_x64", True)
    workload = setup.workload
    images = len(workload.example) == 3
    apply, layouts = _translate(list(setup.model), jax, jnp)

    def to_jax(tensor: Tensor, layout=None):
        array = tensor.detach().numpy()
        return jnp.asarray(array if layout is None else np.transpose(array, layout))

    start = [to_jax(p, layouts.get(i)) for i, p in enumerate(setup.model.parameters())]
    support, query = (
        (to_jax(part.inputs, (0, 1, 3, 4, 2) if images else None), to_jax(part.targets))
        for part in setup.tasks
    )

    def loss(parameters, inputs, targets):
        outputs = apply(iter(parameters), inputs)
        if workload.ways is None:
            return jnp.mean((outputs - targets) ** 2)
        picked = jnp.take_along_axis(jax.nn.log_softmax(outputs), targets[:, None], axis=1)
        return -jnp.mean(picked)

    def one_task(parameters, support, query):
        for _ in range(workload.steps):
            slope = jax.grad(loss)(parameters, *support)
            parameters = [p - workload.inner_lr * s for p, s in zip(parameters, slope)]
        return jax.grad(loss)(parameters, *query)

    @jax.jit
    def vmapped(parameters, support, query):
        slopes = jax.vmap(one_task, in_axes=(None, 0, 0))(parameters, support, query)
        return [slope.mean(0) for slope in slopes]

    @jax.jit
    def mapped(parameters, support, query):
        slopes = jax.lax.map(lambda task: one_task(parameters, *task), (support, query))
        return [slope.mean(0) for slope in slopes]

    @jax.jit
    def add(total, parameters, support, query):
        return [t + slope for t, slope in zip(total, one_task(parameters, support, query))]

    tasks = workload.tasks
    each = [jax.tree.map(lambda array, i=i: array[i], (support, query)) for i in range(tasks)]

    def looped(parameters, support, query):
        total = [jnp.zeros_like(p) for p in parameters]
        for task in each:
            total = add(total, parameters, *task)
        return [t / tasks for t in total]

    program = {"vmap": vmapped, "map": mapped, "loop": looped}[over_tasks]

    def read(result) -> list[Tensor]:
        found = []
        for i, array in enumerate(result):
            array = np.asarray(array)
            found.append(torch.tensor(np.transpose(array, np.argsort(layouts[i])) if i in layouts else array))
        return found

    return lambda: jax.block_until_ready(program(start, support, query)), read


def _translate(layers: list[nn.Module], jax, jnp):
    """(apply(parameters in torch's order, inputs) → outputs, axes by the position of a turned parameter)."""
    lax = jax.lax

    def linear(p, x):
        weight, bias = next(p), next(p)
        return x @ weight.T + bias

    def conv(p, x, layer):
        weight, bias = next(p), next(p)
        pads = [(n, n) for n in layer.padding]
        turned = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(x, weight, layer.stride, pads, dimension_numbers=turned) + bias

    def norm(x, axes, eps, weight, bias):
        mean, variance = x.mean(axes, keepdims=True), x.var(axes, keepdims=True)
        return (x - mean) * (lax.rsqrt(variance + eps) * weight) + bias

    def encoder(p, x, layer):
        examples, tokens, width = x.shape
        heads = layer.self_attn.num_heads
        q, k, v = (
            part.reshape(examples, tokens, heads, -1).swapaxes(1, 2)
            for part in jnp.split(linear(p, x), 3, axis=-1)
        )
        weights = jax.nn.softmax(q @ k.swapaxes(2, 3) / (width // heads) ** 0.5)
        attended = linear(p, (weights @ v).swapaxes(1, 2).reshape(x.shape))
        first, second = (next(p), next(p)), (next(p), next(p))
        norms = (next(p), next(p)), (next(p), next(p))
        x = norm(x + attended, -1, layer.norm1.eps, *norms[0])
        fed = linear(iter(second), jax.nn.relu(linear(iter(first), x)))
        return norm(x + fed, -1, layer.norm2.eps, *norms[1])

    def pool(x):
        return lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")

    def apply(p, x):
        for layer in layers:
            name = type(layer).__name__
            if name == "Linear":
                x = linear(p, x)
            elif name == "Conv2d":
                x = conv(p, x, layer)
            elif name == "BatchNorm2d":
                x = norm(x, (0, 1, 2), layer.eps, next(p), next(p))
            elif name == "ReLU":
                x = jax.nn.relu(x)
            elif name == "MaxPool2d":
                x = pool(x)
            elif name == "Flatten":
                x = jnp.moveaxis(x, -1, 1).reshape(len(x), -1)
            elif name == "MeanOver":
                x = x.mean((1, 2) if x.ndim == 4 else 1)
            elif name == "TransformerEncoderLayer":
                x = encoder(p, x, layer)
            else:
                raise NotImplementedError(f"no JAX twin of {name}")
        return x

    shapes = [p for layer in layers for p in layer.parameters()]
    return apply, {i: (2, 3, 1, 0) for i, p in enumerate(shapes) if p.dim() == 4}
