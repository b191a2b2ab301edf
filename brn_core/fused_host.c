/* The kernels of brn_core/fused.py for the CPU. No header and no library, so that any C compiler will do. */

static float clipped(float value, float low, float high) {
    /* NaN is below no limit and above none. */
    return value < low ? low : value > high ? high : value;
}

static float or_zero(float value) {
    return value - value == 0.0f ? value : 0.0f; /* not of NaN or an infinity */
}

/* Answers 1 / sigma_B, r, d, gamma r, gamma d + beta; and sigma_B and what mu and sigma were, unless these are null. */
void correct(
    long C, const float *restrict mean, const float *restrict var, float *restrict mu, float *restrict sigma,
    const float *r_min_at, const float *r_max_at, const float *d_max_at, long long *count,
    const float *restrict weight, const float *restrict bias, double alpha64, double eps64,
    float *restrict inverse, float *restrict r, float *restrict d, float *restrict scale, float *restrict shift,
    float *restrict batch_sigma, float *restrict mu_was, float *restrict sigma_was
) {
    const float r_min = *r_min_at, r_max = *r_max_at, d_max = *d_max_at;
    const float alpha = (float)alpha64, eps = (float)eps64;
    /* Short loops, which compilers turn into vector instructions. */
    if (mu_was)
        for (long c = 0; c < C; c++) {
            batch_sigma[c] = __builtin_sqrtf(var[c] + eps);
            mu_was[c] = mu[c];
            sigma_was[c] = sigma[c];
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
