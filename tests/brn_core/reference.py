"""Algorithm 1 and the six gradient equations of Ioffe 2017, section 3, in plain float64 numpy, one line an equation.

Written from the paper alone and sharing nothing with the package. x_CM has the m elements of each channel in a row.
"""

import dataclasses

import numpy as np


@dataclasses.dataclass
class Forward:
    y: np.ndarray
    mu_B: np.ndarray
    sigma_B: np.ndarray
    r: np.ndarray
    d: np.ndarray
    new_mu: np.ndarray
    new_sigma: np.ndarray


def to_rows(x):
    """(N, C, *) to (C, m)."""
    x = np.asarray(x, dtype=np.float64)
    return np.moveaxis(x, 1, 0).reshape(x.shape[1], -1)


def from_rows(rows, shape):
    """(C, m) to (N, C, *)."""
    return np.moveaxis(rows.reshape(shape[1], shape[0], *shape[2:]), 0, 1)


def forward(x, gamma, beta, mu, sigma, r_min, r_max, d_max, alpha, eps):
    x_CM = to_rows(x)
    mu_B = x_CM.mean(axis=1)
    sigma_B = np.sqrt(eps + ((x_CM - mu_B[:, None]) ** 2).mean(axis=1))
    r = np.clip(sigma_B / sigma, r_min, r_max)
    d = np.clip((mu_B - mu) / sigma, -d_max, d_max)
    xhat = (x_CM - mu_B[:, None]) / sigma_B[:, None] * r[:, None] + d[:, None]
    y = gamma[:, None] * xhat + beta[:, None]
    return Forward(
        y=from_rows(y, np.shape(x)),
        mu_B=mu_B,
        sigma_B=sigma_B,
        r=r,
        d=d,
        new_mu=mu + alpha * (mu_B - mu),
        new_sigma=sigma + alpha * (sigma_B - sigma),
    )


def backward(dy, x, gamma, f):
    """dl/dx, dl/dgamma, dl/dbeta with r and d constant."""
    dy_CM, x_CM = to_rows(dy), to_rows(x)
    m = x_CM.shape[1]
    centred = x_CM - f.mu_B[:, None]
    xhat = centred / f.sigma_B[:, None] * f.r[:, None] + f.d[:, None]
    dxhat = dy_CM * gamma[:, None]
    dsigma_B = (dxhat * centred * (-f.r / f.sigma_B**2)[:, None]).sum(axis=1)
    dmu_B = (dxhat * (-f.r / f.sigma_B)[:, None]).sum(axis=1)
    dx = (
        dxhat * (f.r / f.sigma_B)[:, None] + dsigma_B[:, None] * centred / (m * f.sigma_B[:, None]) + dmu_B[:, None] / m
    )
    dgamma = (dy_CM * xhat).sum(axis=1)
    dbeta = dy_CM.sum(axis=1)
    return from_rows(dx, np.shape(x)), dgamma, dbeta


def inference(x, gamma, beta, mu, sigma):
    y = gamma[:, None] * (to_rows(x) - mu[:, None]) / sigma[:, None] + beta[:, None]
    return from_rows(y, np.shape(x))
