"""The paper as code: pure functions of tensors, one module a topic, nothing else.

Symbols are those of arXiv 2406.05768 (MLCM / TLCM), declared here once:

    x0       clean latent                                  (B, C, H, W), or (B, D) in tests
    eps      standard normal noise                         as x0
    x_t      alpha_t x0 + sigma_t eps                      as x0
    t        the time a jump starts from                   (B,) int64, 0 <= t < T, noise grows with t
    r        the next point on the trajectory, r < t       (B,) int64
    s        the time a jump ends at, s <= r               (B,) int64
    T        number of discrete times (1000)
    K        number of segments the time axis is cut into
    alpha    signal scale at a time, sigma: noise scale    (T,) float32
    f        student's estimate of x0 from (x_t, t)
    g        f carried to s by one DDIM step: the transfer

and for preference learning, after DPO (2305.18290) and GRPO (2402.03300):

    r        reward, higher is better; in these three modules only                         (B,) or (P, n)
    l        denoising error of a sample, l_ref that of the reference                      (B,)
    h        implicit reward margin, beta (log-ratio of chosen - log-ratio of rejected)    (B,)
    gamma    share of a sampling step that is noise; N(mean, std^2) is the step's x_s      float
    A        advantage                                                                     (B,) or (P, n)

Shapes use one letter each: B batch, C channels, H height, W width, T times, K segments, L tokens, D features,
P prompts, n samples of one prompt.
"""
