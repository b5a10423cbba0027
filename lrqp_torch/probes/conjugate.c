/* Conjugate gradients for one Newton step of a probe of two classes: the loop of _newton_step in
 * multinomial.py, which reads the features once in a product where two products of torch read them
 * twice. Of H = Xᵀ diag(c) X + l2 I, the last feature's penalty left out, and a preconditioner that
 * is diagonal or has a factor, X is (n, p), by rows. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#define SEARCH(T, NAME) \
    typedef T V##NAME __attribute__((vector_size(64), aligned(4), may_alias)); \
 \
    static inline T sum_##NAME(V##NAME v) { \
        T total = 0; \
        for (int64_t k = 0; k < (int64_t)(sizeof v / sizeof(T)); k++) total += v[k]; \
        return total; \
    } \
 \
    /* Dot products of four rows with a vector. */ \
    static void four_##NAME(const T *a, const T *b, const T *c, const T *d, const T *v, \
                            int64_t p, T *out) { \
        const int64_t lanes = sizeof(V##NAME) / sizeof(T); \
        V##NAME s = {0}, t = {0}, u = {0}, w = {0}; \
        int64_t j = 0; \
        for (; j + lanes <= p; j += lanes) { \
            V##NAME x = *(const V##NAME *)(v + j); \
            s += x * *(const V##NAME *)(a + j); \
            t += x * *(const V##NAME *)(b + j); \
            u += x * *(const V##NAME *)(c + j); \
            w += x * *(const V##NAME *)(d + j); \
        } \
        out[0] = sum_##NAME(s), out[1] = sum_##NAME(t); \
        out[2] = sum_##NAME(u), out[3] = sum_##NAME(w); \
        for (; j < p; j++) { \
            out[0] += v[j] * a[j], out[1] += v[j] * b[j]; \
            out[2] += v[j] * c[j], out[3] += v[j] * d[j]; \
        } \
    } \
 \
    static T dot_##NAME(const T *a, const T *b, int64_t p) { \
        const int64_t lanes = sizeof(V##NAME) / sizeof(T); \
        V##NAME s = {0}; \
        int64_t j = 0; \
        for (; j + lanes <= p; j += lanes) \
            s += *(const V##NAME *)(a + j) * *(const V##NAME *)(b + j); \
        T total = sum_##NAME(s); \
        for (; j < p; j++) total += a[j] * b[j]; \
        return total; \
    } \
 \
    /* H v. Rows are added up in parts, so that rounding grows with √n at most. */ \
    static void product_##NAME(const T *x, const T *c, int64_t n, int64_t p, T l2, const T *v, \
                               T *restrict part, T *restrict out) { \
        for (int64_t j = 0; j < p; j++) out[j] = j < p - 1 ? l2 * v[j] : 0; \
        for (int64_t begin = 0; begin < n; begin += 256) { \
            int64_t end = begin + 256 < n ? begin + 256 : n, i = begin; \
            memset(part, 0, p * sizeof(T)); \
            for (; i + 4 <= end; i += 4) { \
                const T *a = x + i * p, *b = a + p, *d = b + p, *e = d + p; \
                T z[4]; \
                four_##NAME(a, b, d, e, v, p, z); \
                T q = c[i] * z[0], r = c[i + 1] * z[1], s = c[i + 2] * z[2], t = c[i + 3] * z[3]; \
                for (int64_t j = 0; j < p; j++) \
                    part[j] += (q * a[j] + r * b[j]) + (s * d[j] + t * e[j]); \
            } \
            for (; i < end; i++) { \
                const T *a = x + i * p, q = c[i] * dot_##NAME(a, v, p); \
                for (int64_t j = 0; j < p; j++) part[j] += q * a[j]; \
            } \
            for (int64_t j = 0; j < p; j++) out[j] += part[j]; \
        } \
    } \
 \
    /* L⁻ᵀ L⁻¹ r, or r times the diagonal's inverse where there is no factor L⁻¹. */ \
    static void solve_##NAME(const T *factor, const T *inverse, const T *r, int64_t p, \
                             T *restrict z) { \
        for (int64_t j = 0; j < p; j++) z[j] = factor ? 0 : inverse[j] * r[j]; \
        for (int64_t i = 0; factor && i < p; i++) { \
            const T *row = factor + i * p, q = dot_##NAME(row, r, i + 1); \
            for (int64_t j = 0; j <= i; j++) z[j] += q * row[j]; \
        } \
    } \
 \
    /* The step, from zero, and how many products it took. Room for 4 p numbers. */ \
    int64_t lrqp_search_##NAME(const T *x, const T *c, const T *inverse, const T *factor, \
                               T *residual, T *step, T *room, int64_t n, int64_t p, double l2, \
                               double target, int64_t most) { \
        T *solved = room, *direction = room + p, *curved = room + 2 * p, *part = room + 3 * p; \
        solve_##NAME(factor, inverse, residual, p, solved); \
        memcpy(direction, solved, p * sizeof(T)); \
        T known = dot_##NAME(residual, solved, p); \
        for (int64_t number = 0; number < most; number++) { \
            if (!(sqrt(dot_##NAME(residual, residual, p)) > target)) return number; \
            product_##NAME(x, c, n, p, l2, direction, part, curved); \
            T curvature = dot_##NAME(direction, curved, p); \
            if (!(curvature > 0)) return number; \
            T length = known / curvature; \
            for (int64_t j = 0; j < p; j++) { \
                step[j] += length * direction[j]; \
                residual[j] -= length * curved[j]; \
            } \
            solve_##NAME(factor, inverse, residual, p, solved); \
            T before = known, ratio = (known = dot_##NAME(residual, solved, p)) / before; \
            for (int64_t j = 0; j < p; j++) direction[j] = solved[j] + ratio * direction[j]; \
        } \
        return most; \
    }

SEARCH(float, float)
SEARCH(double, double)
