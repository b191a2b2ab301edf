/* The kernels of brn_core/fused.py for the CPU. No header and no library, so that any C compiler will do. */

static float clipped(float value, float low, float high) {
    /* NaN is below no limit and above none. */
    return value < low ? low : value > high ? high : value;
}

static float or_zero(float value) {
    return value - value == 0.0f ? value : 0.0f; /* not of NaN or an infinity */
}

/* Rows of C numbers: 1 / sigma_B, r, d, gamma r, gamma d + beta in `made`; unless null, sigma_B and what mu and sigma
   were in `before`. */
void correct(
    long C, const float *restrict mean, const float *restrict var, float *restrict mu, float *restrict sigma,
    const float *r_min_at, const float *r_max_at, const float *d_max_at, long long *count,
    const float *restrict weight, const float *restrict bias, double alpha64, double eps64,
    float *made, float *before
) {
    const float r_min = *r_min_at, r_max = *r_max_at, d_max = *d_max_at;
    const float alpha = (float)alpha64, eps = (float)eps64;
    float *restrict inverse = made, *restrict r = made + C, *restrict d = made + 2 * C;
    float *restrict scale = made + 3 * C, *restrict shift = made + 4 * C;
    /* Short loops, which compilers turn into vector instructions. */
    if (before) {
        float *restrict sigma_B = before, *restrict old_mu = before + C, *restrict old_sigma = before + 2 * C;
        for (long c = 0; c < C; c++) {
            sigma_B[c] = __builtin_sqrtf(var[c] + eps);
            old_mu[c] = mu[c];
            old_sigma[c] = sigma[c];
        }
    }
    for (long c = 0; c < C; c++) {
        const float sigma_B = __builtin_sqrtf(var[c] + eps), off = mean[c] - mu[c], wider = sigma_B - sigma[c];
        inverse[c] = 1.0f / sigma_B;
        r[c] = clipped(sigma_B / sigma[c], r_min, r_max);
        d[c] = clipped(off / sigma[c], -d_max, d_max);
        mu[c] += alpha * or_zero(off);
        sigma[c] += alpha * or_zero(wider);
    }
    for (long c = 0; c < C; c++) {
        scale[c] = weight ? weight[c] * r[c] : r[c];
        shift[c] = weight ? weight[c] * d[c] : d[c];
    }
    if (bias)
        for (long c = 0; c < C; c++)
            shift[c] += bias[c];
    *count += 1;
}

/* r dz + d db, in place of dz. */
void weight_gradient(
    long C, float *restrict dz, const float *restrict db, const float *restrict r, const float *restrict d
) {
    for (long c = 0; c < C; c++)
        dz[c] = r[c] * dz[c] + d[c] * db[c];
}
