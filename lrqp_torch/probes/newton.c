/* The search of multinomial.py's minimise for one probe in memory on a CPU, in one call: Newton
 * steps by conjugate gradients, the length along each, and where it ends. Steps, constants and
 * formulas are those said there. An evaluation and a product with the Hessian read the features
 * once, where two products of torch read them twice, and the change of the logits along a step
 * comes from the products that found it.
 *
 * Of C rows of parameters (C, p) and n examples, features are (n, p) by rows: the d activations
 * less their mean, zeros that make p a multiple of LINE, and 1. Logits and probabilities are (n, C).
 * Sums over examples are those of a few slices, whatever the number of threads, so that it changes
 * no bit. What is in float and in double is written once, below `#else`. */

#ifndef REAL

#include <math.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* Bytes of a vector, and classes whose sums stay in registers. */
#ifdef __AVX512F__
#define WIDE 64
#define TILE 5
#else
#define WIDE 32
#define TILE 2
#endif
#define UNROLL _Pragma("GCC unroll 8")
/* Keeps a vector in its register, where a compiler would load it again. */
#ifdef __x86_64__
#define HOLD(v) __asm__("" : "+v"(v))
#else
#define HOLD(v) (void)(v)
#endif
#define INLINE static inline __attribute__((always_inline))
/* Rows that are read at a time, and those whose sums are added up, so that rounding grows with √n
 * at most. */
#define CHUNK 32
#define PART 256
/* Slices of the examples, at most, which threads share; and the work, in features times rows, from
 * which on more threads than one are worth their start. */
#define SLICES 8
#define SHARED_FROM (1 << 19)

typedef struct {
    const void *given;      /* The activations, (n, d), in float or in double. */
    const double *mean;     /* Theirs, about, (d,) */
    void *features;         /* Room for the features, (n, p), in float or in double. */
    const double *targets;  /* (C, n) */
    const double *weights;  /* (n,), or null */
    double *parameters;     /* The point, from zero, (C, p). */
    double *probability;    /* Of the examples there, (n, C). */
    /* L⁻¹ (R, p, p) in the dtype of the products; null as long as there is none. One is of all
     * classes. */
    const void *factor;
    int64_t n, p, rows, factors, most_steps, most_products, narrow_steps;
    int64_t width, stride, threads;   /* d, numbers from one activation to the next, threads. */
    /* Whether activations and features are in float; whether features are there. */
    int64_t given_narrow, kept_narrow, kept;
    int64_t spent; /* Products since there is this factor; more at the start ask for one then. */
    double total, l2, tolerance, patience;
    /* What is found; steps, and whether products are in float. */
    double loss, size, start, rounding;
    int64_t steps, is_narrow;
} problem;

typedef struct {
    double loss, size, curvature;
    double *parameters, *gradient, *logits, *probability;
} point;

/* A sum over all examples. */
typedef struct pass {
    void (*work)(const struct pass *, int64_t begin, int64_t end, double *room);
    const problem *q;
    const point *at;                 /* Of an evaluation, */
    int64_t first;                   /* and whether it is the one that makes the features. */
    const void *bend, *weight, *rows; /* Of a product with the Hessian. */
    void *change;
    double *room; /* For each slice what it sums up, `held` numbers, and what else it needs. */
    int64_t held, each, slices, threads;
} pass;

typedef struct {
    const pass *whole;
    int64_t number;
} helper;

static void *help(void *given) {
    const helper *own = given;
    const pass *whole = own->whole;
    int64_t parts = (whole->q->n + PART - 1) / PART;
    for (int64_t s = own->number; s < whole->slices; s += whole->threads) {
        int64_t begin = parts * s / whole->slices * PART;
        int64_t end = parts * (s + 1) / whole->slices * PART;
        double *room = whole->room + s * whole->each;
        memset(room, 0, whole->held * sizeof(double));
        whole->work(whole, begin, end < whole->q->n ? end : whole->q->n, room);
    }
    return 0;
}

/* The work on each slice; its sums are then in its room. */
static void run(const pass *whole) {
    helper own[SLICES];
    pthread_t running[SLICES];
    int64_t started = 1;
    for (int64_t i = 0; i < whole->threads; i++) own[i] = (helper){whole, i};
    for (; started < whole->threads; started++)
        if (pthread_create(&running[started], 0, help, &own[started])) break;
    help(&own[0]);
    for (int64_t i = started; i < whole->threads; i++) help(&own[i]);
    for (int64_t i = 1; i < started; i++) pthread_join(running[i], 0);
}

/* exp x of x ≤ 0, without branches, so that it is computed of many at once. */
INLINE double power(double x) {
    x = x < -700 ? -700 : x;
    double whole = x * 0x1.71547652b82fep+0 + 0x1.8p52;
    int64_t bits;
    memcpy(&bits, &whole, sizeof bits);
    whole -= 0x1.8p52;
    double r = (x - whole * 0x1.62e42fefa3800p-1) - whole * 0x1.ef35793c76730p-45;
    double sum = 1.0 / 6227020800;
    sum = sum * r + 1.0 / 479001600, sum = sum * r + 1.0 / 39916800;
    sum = sum * r + 1.0 / 3628800, sum = sum * r + 1.0 / 362880, sum = sum * r + 1.0 / 40320;
    sum = sum * r + 1.0 / 5040, sum = sum * r + 1.0 / 720, sum = sum * r + 1.0 / 120;
    sum = sum * r + 1.0 / 24, sum = sum * r + 1.0 / 6, sum = sum * r + 0.5;
    sum = (sum * r + 1) * r + 1;
    bits = (int64_t)((uint64_t)bits << 52) + 0x3ff0000000000000;
    double scale;
    memcpy(&scale, &bits, sizeof scale);
    return sum * scale;
}

/* log(1 + e) of e from 0 to 1 = 2 artanh(e / (2 + e)). */
INLINE double logarithm(double e) {
    double s = e / (2 + e), t = s * s, sum = 1.0 / 33;
    sum = sum * t + 1.0 / 31, sum = sum * t + 1.0 / 29, sum = sum * t + 1.0 / 27;
    sum = sum * t + 1.0 / 25, sum = sum * t + 1.0 / 23, sum = sum * t + 1.0 / 21;
    sum = sum * t + 1.0 / 19, sum = sum * t + 1.0 / 17, sum = sum * t + 1.0 / 15;
    sum = sum * t + 1.0 / 13, sum = sum * t + 1.0 / 11, sum = sum * t + 1.0 / 9;
    sum = sum * t + 1.0 / 7, sum = sum * t + 1.0 / 5, sum = sum * t + 1.0 / 3;
    return 2 * s * (sum * t + 1);
}

/* Probabilities of so many examples from their logits, and, if asked for, what each loses. */
static void predict(const problem *q, int64_t begin, int64_t count, const double *z, double *p,
                    double *lost) {
    int64_t rows = q->rows;
    const double *t = q->targets + begin;
    if (rows == 1) {
        /* z_1 − z_0 is twice that of class 1. */
        for (int64_t i = 0; i < count; i++) {
            double far = 2 * fabs(z[i]), e = power(-far), large = 1 / (1 + e), small = e * large;
            p[i] = z[i] < 0 ? small : large;
            if (lost) lost[i] = logarithm(e) + ((z[i] < 0) == (t[i] > 0) ? far : 0);
        }
        return;
    }
    int64_t first[CHUNK];
    for (int64_t i = 0; i < count; i++) {
        const double *own = z + i * rows;
        double most = own[0];
        first[i] = 0;
        for (int64_t k = 1; k < rows; k++)
            if (own[k] > most) most = own[k], first[i] = k;
        for (int64_t k = 0; k < rows; k++) p[i * rows + k] = own[k] - most;
        if (lost) lost[i] = 0;
        for (int64_t k = 0; lost && k < rows; k++) lost[i] -= t[k * q->n + i] * p[i * rows + k];
    }
    for (int64_t j = 0; j < count * rows; j++) p[j] = power(p[j]);
    for (int64_t i = 0; i < count; i++) {
        double rest = 0, *own = p + i * rows;
        for (int64_t k = 0; k < rows; k++) rest += k == first[i] ? 0 : own[k];
        double part = 1 / (1 + rest);
        for (int64_t k = 0; k < rows; k++) own[k] *= part;
        if (lost) lost[i] += log1p(rest);
    }
}

INLINE double share(const problem *q, int64_t i) {
    return (q->weights ? q->weights[i] : 1) / q->total;
}

/* Derivative of half the penalty, which leaves the bias out. */
INLINE double pull(const problem *q, int64_t j) { return j % q->p < q->p - 1 ? q->l2 : 0; }

/* Features in double, kept or made now. */
static const double *features_double(const problem *q, int64_t begin, int64_t count,
                                     double *restrict room) {
    int64_t d = q->width, p = q->p;
    const double *restrict mean = q->mean;
    if (q->kept && !q->kept_narrow) return (const double *)q->features + begin * p;
    for (int64_t e = 0; e < count; e++) {
        int64_t from = (begin + e) * q->stride;
        double *restrict row = room + e * p;
        const float *restrict narrow = (const float *)q->given + from;
        const double *restrict wide = (const double *)q->given + from;
        if (q->given_narrow)
            for (int64_t j = 0; j < d; j++) row[j] = narrow[j] - mean[j];
        else
            for (int64_t j = 0; j < d; j++) row[j] = wide[j] - mean[j];
        memset(row + d, 0, (p - d) * sizeof(double));
        row[p - 1] = 1;
    }
    return room;
}

/* Those in float, which are kept. */
static const float *features_float(const problem *q, int64_t begin, int64_t count, double *room) {
    (void)count, (void)room;
    return (const float *)q->features + begin * q->p;
}

#define PASTE(a, b) a##_##b
#define GLUE(a, b) PASTE(a, b)
#define NAME(a) GLUE(a, REAL)
#define REAL double
#include __FILE__
#undef REAL
#define REAL float
#include __FILE__
#undef REAL

static void evaluate_slice(const pass *own, int64_t begin, int64_t end, double *room) {
    const problem *q = own->q;
    const point *at = own->at;
    int64_t p = q->p, rows = q->rows;
    double residual[CHUNK * rows], lost[CHUNK];
    /* Loss, curvature, the sums of squares, the gradient; and of some examples. */
    double *sums = room, *squares = sums + 2, *gradient = squares + p, *part = room + own->held;
    double *made = part + rows * p;
    for (int64_t from = begin; from < end; from += PART) {
        int64_t to = from + PART < end ? from + PART : end;
        double some = 0, bent = 0;
        memset(part, 0, rows * p * sizeof(double));
        for (int64_t i = from; i < to; i += CHUNK) {
            int64_t count = to - i < CHUNK ? to - i : CHUNK;
            const double *x = features_double(q, i, count, made);
            double *z = at->logits + i * rows, *found = at->probability + i * rows;
            times_double(x, at->parameters, count, p, p, rows, z);
            predict(q, i, count, z, found, lost);
            for (int64_t e = 0; e < count; e++) {
                double weight = share(q, i + e);
                some += weight * lost[e];
                for (int64_t k = 0; k < rows; k++) {
                    double own = found[e * rows + k];
                    residual[e * rows + k] = weight * (own - q->targets[k * q->n + i + e]);
                    bent += weight * own * (1 - own);
                }
            }
            add_double(x, residual, count, p, p, rows, part);
            if (!own->first) continue;
            for (int64_t e = 0; e < count; e++)
                for (int64_t j = 0; j < p; j++) squares[j] += x[e * p + j] * x[e * p + j];
            if (q->kept_narrow) {
                float *kept = (float *)q->features + i * p;
                for (int64_t j = 0; j < count * p; j++) kept[j] = (float)x[j];
            } else
                memcpy((double *)q->features + i * p, x, count * p * sizeof(double));
        }
        sums[0] += some, sums[1] += bent;
        for (int64_t j = 0; j < rows * p; j++) gradient[j] += part[j];
    }
}

/* Loss and gradient at the point's parameters; if asked for, the sums of the features' squares, and
 * the features. */
static void evaluate(pass *whole, point *at, double *squares) {
    const problem *q = whole->q;
    int64_t p = q->p, rows = q->rows, copies = rows == 1 ? 2 : 1;
    double loss = 0, curvature = 0, penalty = 0, size = 0;
    for (int64_t j = 0; j < rows * p; j++) {
        at->gradient[j] = pull(q, j) * at->parameters[j];
        penalty += at->gradient[j] * at->parameters[j];
    }
    whole->work = evaluate_slice, whole->at = at, whole->first = squares != 0;
    run(whole);
    for (int64_t s = 0; s < whole->slices; s++) {
        const double *sums = whole->room + s * whole->each;
        loss += sums[0], curvature += sums[1];
        for (int64_t j = 0; squares && j < p; j++) squares[j] += sums[2 + j];
        for (int64_t j = 0; j < rows * p; j++) at->gradient[j] += sums[2 + p + j];
    }
    for (int64_t j = 0; j < rows * p; j++) size += at->gradient[j] * at->gradient[j];
    at->loss = loss + copies * penalty / 2, at->size = sqrt(copies * size);
    at->curvature = curvature * (rows == 1 ? 2 : 1.0 / (rows - 1));
}

/* About what multiple of a step has the least loss, by Newton's method from 1. */
static double best_length(const problem *q, const point *at, const double *step,
                          const double *change, double slope) {
    int64_t n = q->n, rows = q->rows;
    double z[CHUNK * rows], p[CHUNK * rows], length = 1, start = 0, bend = 0;
    /* At the optimum the slope is below its rounding, and the full step the best. */
    if (!(fabs(slope) > SETTLED * at->loss)) return 1;
    for (int64_t j = 0; j < rows * q->p; j++) {
        start += pull(q, j) * step[j] * at->parameters[j];
        bend += pull(q, j) * step[j] * step[j];
    }
    for (int number = 0; number < LENGTHS; number++) {
        double first = start + length * bend, second = bend;
        for (int64_t i = 0; i < n; i += CHUNK) {
            int64_t count = n - i < CHUNK ? n - i : CHUNK;
            const double *c = change + i * rows;
            for (int64_t e = 0; e < count * rows; e++)
                z[e] = at->logits[i * rows + e] + length * c[e];
            predict(q, i, count, z, p, 0);
            for (int64_t e = 0; e < count; e++, c += rows) {
                double one = 0, two = 0, mean = 0;
                const double *own = p + e * rows;
                for (int64_t k = 0; k < rows; k++) {
                    one += c[k] * (own[k] - q->targets[k * n + i + e]);
                    two += c[k] * c[k] * (rows == 1 ? 2 * own[k] * (1 - own[k]) : own[k]);
                    mean += rows == 1 ? 0 : own[k] * c[k];
                }
                first += share(q, i + e) * one;
                second += share(q, i + e) * (two - mean * mean);
            }
        }
        double longer = -first / second;
        longer = isfinite(longer) ? fmin(fmax(longer, -length / 2), 2 * length) : 0;
        length += longer;
        if (!(fabs(longer) > CLOSE * length)) break;
    }
    return length;
}

static void swap(point *a, point *b) {
    point kept = *a;
    *a = *b, *b = kept;
}

/* 0, or −1 where there is no memory, or what renew returned, which makes factors of the Hessian at
 * the point. */
int lrqp_minimise(problem *q, int (*renew)(void)) {
    int64_t n = q->n, p = q->p, rows = q->rows, copies = rows == 1 ? 2 : 1;
    int64_t held = rows * p, read = n * rows;
    pass whole = {.q = q, .held = held + p + 2, .slices = (n + PART - 1) / PART};
    whole.slices = whole.slices < SLICES ? whole.slices : SLICES;
    whole.threads = q->threads < whole.slices ? q->threads : whole.slices;
    if (n * held < SHARED_FROM || whole.threads < 1) whole.threads = 1;
    whole.each = whole.held + held + CHUNK * p;
    int64_t shared = whole.slices * whole.each;
    double *room = malloc((shared + 11 * held + 7 * read + 2 * p + n) * sizeof(double));
    if (!room) return -1;
    whole.room = room;
    double *squares = room + shared, *step = squares + p, *change = step + held;
    double *rest = change + read, *own[8];
    for (int k = 0; k < 4; k++) own[k] = rest, rest += held;
    for (int k = 4; k < 8; k++) own[k] = rest, rest += read;
    point at = {0, 0, 0, own[0], own[1], own[4], own[5]};
    point trial = {0, 0, 0, own[2], own[3], own[6], own[7]};
    memset(at.parameters, 0, held * sizeof(double));
    memset(squares, 0, p * sizeof(double));
    evaluate(&whole, &at, squares);
    q->kept = 1;
    /* The rounding error of the gradient's terms, which may cancel, by Cauchy's inequality. */
    double terms = 0, sum = 0;
    for (int64_t i = 0; i < n; i++)
        for (int64_t k = 0; k < rows; k++) {
            double apart = at.probability[i * rows + k] - q->targets[k * n + i];
            terms += (q->weights ? q->weights[i] : 1) * apart * apart;
        }
    int fits = 1, failed = 0, stuck = 0;
    for (int64_t j = 0; j < p; j++) fits &= (squares[j] /= q->total) < HUGE, sum += squares[j];
    q->is_narrow = q->kept_narrow && fits;
    q->start = at.size, q->rounding = 8 * 0x1p-52 * sqrt(copies * terms * sum / q->total);
    double goal = fmax(q->tolerance * at.size, q->rounding);
    for (q->steps = 0; at.size > goal && !stuck && q->steps < q->most_steps;) {
        if (q->spent > q->patience) {
            memcpy(q->probability, at.probability, read * sizeof(double));
            if ((failed = renew())) break;
            q->spent = 0;
        }
        double enough = ENOUGH * goal / sqrt(copies);
        memset(step, 0, held * sizeof(double)), memset(change, 0, read * sizeof(double));
        q->spent += (q->is_narrow ? search_float : search_double)(&whole, &at, squares, enough,
                                                                  step, change, rest);
        double slope = 0;
        for (int64_t j = 0; j < held; j++) slope += copies * at.gradient[j] * step[j];
        double length = best_length(q, &at, step, change, slope);
        for (;; length /= 2) {
            for (int64_t j = 0; j < held; j++)
                trial.parameters[j] = at.parameters[j] + length * step[j];
            evaluate(&whole, &trial, 0);
            /* Near the optimum the decrease is below the loss's rounding; see _line_search. */
            if (trial.loss <= at.loss + ARMIJO * length * slope
                || (trial.loss <= (1 + LEVEL) * at.loss && trial.size < 0.5 * at.size)) {
                swap(&at, &trial);
                break;
            }
            if ((stuck = length < SHORTEST_STEP)) break;
        }
        q->steps++;
        if (q->is_narrow && (stuck || q->steps == q->narrow_steps))
            stuck = q->is_narrow = q->spent = 0, q->factor = 0;
    }
    memcpy(q->parameters, at.parameters, held * sizeof(double));
    q->loss = at.loss, q->size = at.size;
    free(room);
    return failed;
}

#else

#define VECTOR NAME(vector)
typedef REAL VECTOR __attribute__((vector_size(WIDE), aligned(sizeof(REAL)), may_alias));

typedef REAL NAME(half) __attribute__((vector_size(WIDE / 2), may_alias));
typedef REAL NAME(quarter) __attribute__((vector_size(WIDE / 4), may_alias));

/* By halves, since one addition waits for the one before. */
INLINE REAL NAME(sum)(VECTOR v) {
    NAME(half) h[2];
    NAME(quarter) q[2];
    REAL total = 0;
    memcpy(h, &v, sizeof v), h[0] += h[1];
    memcpy(q, h, sizeof q), q[0] += q[1];
    UNROLL for (int k = 0; k < (int)(WIDE / 4 / sizeof(REAL)); k++) total += q[0][k];
    return total;
}

/* Dot products of some rows of features with some of parameters. */
INLINE void NAME(tile)(const REAL *x, const REAL *w, int64_t stride, int64_t p, int64_t rows,
                       int examples, int classes, REAL *out) {
    VECTOR s[4][TILE] = {{{0}}};
    for (int64_t j = 0; j < p; j += WIDE / sizeof(REAL)) {
        VECTOR e[4], v[TILE];
        UNROLL for (int i = 0; i < examples; i++) e[i] = *(const VECTOR *)(x + i * stride + j);
        UNROLL for (int i = 0; i < examples; i++) __builtin_prefetch(x + (i + 4) * stride + j);
        UNROLL for (int k = 0; k < classes; k++) v[k] = *(const VECTOR *)(w + k * stride + j);
        UNROLL for (int i = 0; i < examples; i++) HOLD(e[i]);
        UNROLL for (int k = 0; k < classes; k++) HOLD(v[k]);
        UNROLL for (int k = 0; k < classes; k++)
            UNROLL for (int i = 0; i < examples; i++) s[i][k] += v[k] * e[i];
    }
    UNROLL for (int i = 0; i < examples; i++)
        UNROLL for (int k = 0; k < classes; k++) out[i * rows + k] = NAME(sum)(s[i][k]);
}

/* X Wᵀ, (count, rows), of the first p columns of matrices that have so many as a stride. */
static void NAME(times)(const REAL *x, const REAL *w, int64_t count, int64_t stride, int64_t p,
                        int64_t rows, REAL *out) {
    int64_t i = 0, k;
    for (; i + 4 <= count; i += 4, x += 4 * stride, out += 4 * rows) {
        for (k = 0; k + TILE <= rows; k += TILE)
            NAME(tile)(x, w + k * stride, stride, p, rows, 4, TILE, out + k);
        for (; k + 2 <= rows; k += 2)
            NAME(tile)(x, w + k * stride, stride, p, rows, 4, 2, out + k);
        if (k < rows) NAME(tile)(x, w + k * stride, stride, p, rows, 4, 1, out + k);
    }
    for (; i < count; i++, x += stride, out += rows)
        for (k = 0; k < rows; k++) NAME(tile)(x, w + k * stride, stride, p, rows, 1, 1, out + k);
}

/* Add what some rows of features give to some of parameters. */
INLINE void NAME(spread)(const REAL *x, const REAL *q, int64_t stride, int64_t p, int64_t rows,
                         int examples, int classes, REAL *restrict out) {
    REAL own[4][TILE];
    UNROLL for (int i = 0; i < examples; i++)
        UNROLL for (int k = 0; k < classes; k++) own[i][k] = q[i * rows + k];
    for (int64_t j = 0; j < p; j += WIDE / sizeof(REAL)) {
        VECTOR v[4], total[TILE];
        UNROLL for (int i = 0; i < examples; i++) v[i] = *(const VECTOR *)(x + i * stride + j);
        UNROLL for (int i = 0; i < examples; i++) HOLD(v[i]);
        UNROLL for (int k = 0; k < classes; k++) total[k] = *(const VECTOR *)(out + k * stride + j);
        UNROLL for (int i = 0; i < examples; i++)
            UNROLL for (int k = 0; k < classes; k++) total[k] += own[i][k] * v[i];
        UNROLL for (int k = 0; k < classes; k++) *(VECTOR *)(out + k * stride + j) = total[k];
    }
}

/* Add Qᵀ X, (rows, p), of the same columns. */
static void NAME(add)(const REAL *x, const REAL *q, int64_t count, int64_t stride, int64_t p,
                      int64_t rows, REAL *restrict out) {
    int64_t i = 0, k;
    for (; i + 4 <= count; i += 4, x += 4 * stride, q += 4 * rows) {
        for (k = 0; k + TILE <= rows; k += TILE)
            NAME(spread)(x, q + k, stride, p, rows, 4, TILE, out + k * stride);
        for (; k + 2 <= rows; k += 2)
            NAME(spread)(x, q + k, stride, p, rows, 4, 2, out + k * stride);
        if (k < rows) NAME(spread)(x, q + k, stride, p, rows, 4, 1, out + k * stride);
    }
    for (; i < count; i++, x += stride, q += rows)
        for (k = 0; k < rows; k++)
            NAME(spread)(x, q + k, stride, p, rows, 1, 1, out + k * stride);
}

INLINE REAL NAME(dot)(const REAL *a, const REAL *b, int64_t count) {
    VECTOR s = {0};
    for (int64_t j = 0; j < count; j += WIDE / sizeof(REAL))
        s += *(const VECTOR *)(a + j) * *(const VECTOR *)(b + j);
    return NAME(sum)(s);
}

/* Rows less their mean over the classes, which is nothing but rounding; see _centred. */
static void NAME(centre)(REAL *v, int64_t p, int64_t rows) {
    for (int64_t j = 0; rows > 1 && j < p; j++) {
        REAL mean = 0;
        for (int64_t k = 0; k < rows; k++) mean += v[k * p + j];
        mean /= rows;
        for (int64_t k = 0; k < rows; k++) v[k * p + j] -= mean;
    }
}

static void NAME(product_slice)(const pass *own, int64_t begin, int64_t end, double *room) {
    const problem *q = own->q;
    int64_t p = q->p, rows = q->rows;
    const REAL *weight = own->weight;
    REAL moved[CHUNK * rows], *sums = (REAL *)room, *part = (REAL *)(room + own->held);
    double *made = room + own->held + rows * p;
    for (int64_t from = begin; from < end; from += PART) {
        int64_t to = from + PART < end ? from + PART : end;
        memset(part, 0, rows * p * sizeof(REAL));
        for (int64_t i = from; i < to; i += CHUNK) {
            int64_t count = to - i < CHUNK ? to - i : CHUNK;
            const REAL *x = NAME(features)(q, i, count, made);
            const REAL *bend = (const REAL *)own->bend + i * rows;
            REAL *z = (REAL *)own->change + i * rows;
            NAME(times)(x, own->rows, count, p, p, rows, z);
            for (int64_t e = 0; e < count; e++, bend += rows, z += rows) {
                REAL mean = 0;
                for (int64_t k = 0; rows > 1 && k < rows; k++) mean += bend[k] * z[k];
                for (int64_t k = 0; k < rows; k++)
                    moved[e * rows + k] = weight[i + e] * bend[k] * (z[k] - mean);
            }
            NAME(add)(x, moved, count, p, p, rows, part);
        }
        for (int64_t j = 0; j < rows * p; j++) sums[j] += part[j];
    }
}

/* H v, and by how much it changes the logits. */
static void NAME(product)(pass *whole, const REAL *v, REAL *restrict out) {
    const problem *q = whole->q;
    int64_t p = q->p, rows = q->rows;
    whole->work = NAME(product_slice), whole->rows = v;
    run(whole);
    for (int64_t k = 0; k < rows; k++)
        for (int64_t j = 0; j < p; j++)
            out[k * p + j] = j < p - 1 ? (REAL)q->l2 * v[k * p + j] : 0;
    for (int64_t s = 0; s < whole->slices; s++) {
        const REAL *sums = (const REAL *)(whole->room + s * whole->each);
        for (int64_t j = 0; j < rows * p; j++) out[j] += sums[j];
    }
    NAME(centre)(out, p, rows);
}

/* L⁻ᵀ L⁻¹ r, or r times the diagonal's inverse where there is no factor L⁻¹. */
static void NAME(solve)(const problem *q, const REAL *inverse, const REAL *r, REAL *restrict out) {
    int64_t p = q->p, rows = q->rows, own = q->factors > 1 ? 1 : rows;
    const REAL *factor = q->factor;
    REAL along[CHUNK * rows];
    for (int64_t k = 0; k < rows; k++)
        for (int64_t j = 0; j < p; j++) out[k * p + j] = factor ? 0 : inverse[j] * r[k * p + j];
    for (int64_t f = 0; factor && f < q->factors; f++, factor += p * p, r += p, out += p)
        for (int64_t i = 0; i < p; i += CHUNK) {
            int64_t count = p - i < CHUNK ? p - i : CHUNK;
            NAME(times)(factor + i * p, r, count, p, i + count, own, along);
            NAME(add)(factor + i * p, along, count, p, i + count, own, out);
        }
}

/* A Newton step, from zero, by conjugate gradients, and how much it changes the logits; returns how
 * many products it took. */
static int64_t NAME(search)(pass *whole, const point *at, const double *squares, double enough,
                            double *step, double *change, void *room) {
    const problem *q = whole->q;
    int64_t n = q->n, p = q->p, rows = q->rows, held = rows * p, copies = rows == 1 ? 2 : 1;
    int64_t number = 0;
    double gained = 0, last = 0;
    REAL *residual = room, *solved = residual + held, *direction = solved + held;
    REAL *curved = direction + held, *inverse = curved + held;
    REAL *bend = inverse + p, *weight = bend + n * rows, *moved = weight + n;
    for (int64_t i = 0; i < n; i++) {
        weight[i] = (q->weights ? q->weights[i] : 1) / q->total;
        for (int64_t k = 0; k < rows; k++) {
            double own = at->probability[i * rows + k];
            bend[i * rows + k] = rows == 1 ? 2 * own * (1 - own) : own;
        }
    }
    for (int64_t j = 0; j < p; j++)
        inverse[j] = 1 / fmax((j < p - 1 ? q->l2 : 0) + at->curvature * squares[j],
                              sizeof(REAL) == 8 ? 0x1p-1022 : 0x1p-126);
    for (int64_t j = 0; j < held; j++) residual[j] = -at->gradient[j];
    NAME(centre)(residual, p, rows);
    NAME(solve)(q, inverse, residual, solved), NAME(centre)(solved, p, rows);
    memcpy(direction, solved, held * sizeof(REAL));
    REAL known = NAME(dot)(residual, solved, held);
    whole->bend = bend, whole->weight = weight, whole->change = moved;
    for (; number < q->most_products; number++) {
        if (!(sqrt(NAME(dot)(residual, residual, held)) > enough)) break;
        if (number && number * last <= fmin(FEW, sqrt(gained / at->loss)) * gained) break;
        NAME(product)(whole, direction, curved);
        REAL curvature = NAME(dot)(direction, curved, held);
        if (!(curvature > 0)) break;
        REAL length = known / curvature, before = known;
        last = copies * length * known, gained += last;
        for (int64_t j = 0; j < held; j++) {
            step[j] += length * direction[j];
            residual[j] -= length * curved[j];
        }
        for (int64_t i = 0; i < n * rows; i++) change[i] += length * moved[i];
        NAME(solve)(q, inverse, residual, solved), NAME(centre)(solved, p, rows);
        known = NAME(dot)(residual, solved, held);
        for (int64_t j = 0; j < held; j++)
            direction[j] = solved[j] + known / before * direction[j];
    }
    return number;
}

#undef VECTOR

#endif
