/* The dual active set of pivots.py, one problem at a time: the same steps, constants and verdicts.
 *
 * minimise 1/2 l'Ml - g'l over l >= 0, for many problems; see active_set.py for the method and
 * native.py for who compiles this and how. Constants come from pivots.py with the compiler's -D.
 * Everything is float64 and contiguous.
 */
#include <math.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef int64_t i64;

/* What problems share. Of classes: squared distances (K, K), from which M follows for each target;
 * noise, length and stretch likewise; and what logits are read by and edits move along, (R, d) with
 * R = K, or the one difference of two classes. Else each problem has its own M (B, m, m) and noise. */
typedef struct {
    i64 classes; /* K, or 0 */
    i64 m, width, rows; /* rows: R */
    const double *matrix, *noise, *length, *stretch, *weight, *bias, *steering;
    const double *grams; /* of few classes M itself for each target (K, K, K), with an empty row for it */
    const double *low;   /* where some classes are nearly equal: what to add to steering (K, d) */
    double unit; /* of stretch */
    /* Of several probes, each to be written, kept or left free (stacked.py): matrix, noise and length are
     * those of all pairs of classes, (P, P), (P) and (P), and */
    i64 variables, pairs; /* V, or 0, and P */
    const i64 *plus, *minus; /* of a pair its two classes among all (P), */
    const i64 *slots;        /* where the m constraints of each variable begin (V + 1), */
    const i64 *begins;       /* its classes among all (V + 1), */
    const i64 *first;        /* and its pairs (V), */
    const i64 *tolerant;     /* whether it is kept within a tolerance (V). */
} Shared;

typedef struct {
    i64 count, each;        /* problems; floors an example: 1 or m */
    const i64 *target;
    const double *margins;  /* (B, m), where there is no x */
    double *floor;          /* (B, each) */
    i64 ruled;              /* whether floors come from the odds rule and are written here: */
    double log_odds;        /* max(belief, log_odds), the belief as far as */
    i64 mirror;             /* it is mirrored, */
    const i64 *source;      /* in a class (B), negative or NULL: the one that is read */
    i64 max_pivots;
    double *multipliers;    /* (B, m) */
    double *numbers;        /* (6, B), or NULL to read alone: KKT residual, l'Ml, squared
                             * Euclidean length, floor, log odds of the strongest rival before, after */
    i64 *status;            /* (B): see solution.py; without x the verdict bits below */
    double *aims;           /* (B, m): floors that the last solve aimed at, or NULL */
    i64 slots;              /* room for the active sets, or 0 */
    i64 *index;             /* (B, slots), m where a slot is empty */
    double *inverse;        /* (B, slots, slots), or NULL */
    const void *x;          /* activations (B, d), or NULL */
    void *result;           /* edited ones (B, d) */
    const void *base;       /* what the stream adds to scale * (what is written), (B, d), or NULL */
    double scale;
    i64 kind, stride, base_stride; /* a Kind; from row to row of x and base */
    double epsilon;         /* of the dtype */
    double advance;         /* times length * size + what is missing is aimed higher at first */
    double tolerance;       /* on the residual of an accurate solve */
    i64 rounds;
    /* Of rows of a stream within a model: */
    i64 within;             /* whether they are; then x and result are streams (R, d), */
    i64 all;                /* R, x at mid is what is written beside the base, and what */
    const i64 *place;       /* each of them is the row (B), or NULL: its own */
    double *record;         /* follows is recorded, (B, 9) */
    const i64 *numbered;    /* what each is numbered (B), or NULL: from */
    i64 first, pass;        /* a number on; and the number of the pass */
    i64 parts;              /* what probes hold now, and held when the geometry was computed: */
    const void *const *live, *const *known;
    const i64 *bytes;
    /* Of several variables, where target and source are (B, V) and each is m: */
    const double *rules;    /* of each: mirror, log_odds, what is added, and its tolerance (V, 4) */
    const double *asked;    /* log odds in place of the rules' (B, V), NaN where there are none, or NULL */
    double *odds;           /* (B, 4V): log odds before, after, floors, and how far each moved */
    i64 one_target, one_source, one_asked; /* whether the first of these is that of all */
    uint8_t *active;        /* (B, m): which multipliers are positive, or NULL */
    i64 total;              /* whether odds are total odds, of a probe whose grams are at hand */
    i64 copies;             /* whether the result begins as a copy of the stream */
} Task;

enum { FEASIBLE = 1, CONVERGED = 2, NEEDED = 4, VALID = 8 };
enum { FRESH, RECOVER, LIVE }; /* where a solve begins */
enum { UNMOVED, SOLVED, INFEASIBLE, INACCURATE, INVALID }; /* solution.Status */
enum { KEEP = -2, FREE }; /* in place of a class, see stacked.py; */
enum { NOTHING, WRITTEN, WITHIN, FIXED }; /* and what a constraint is for then */

typedef struct {
    i64 n, cap; /* columns: constraints, or classes; room for active ones */
    double *scale, *error, *gap, *unit, *slack, *tolerance, *row, *grown, *start, *raised, *coefficients;
    double *rows;    /* of the held, (cap, n) */
    double *inverse; /* (cap, cap) */
    double *multipliers, *rate, *column, *right;
    i64 *held, k, doubt; /* whether some of the held nearly depend on the others */
    const double *gram; /* of the target, where these are at hand */
    /* Of several variables: what was chosen last (V), or -3; of each constraint its pair and what it is
     * for; M', its noise and the lengths; and A' as combinations of rows where some are kept. */
    i64 *chosen, *pair, *kind, kept;
    double *own, *noise, *length, *combination;
    const double *share; /* multipliers of all slots, also of what is kept */
    struct Total *total; /* of total odds, or NULL */
} Work;

static inline double larger(double old, double other) { return other > old ? other : old; }

static inline i64 target_of(const Task *t, i64 b) { return t->target[t->one_target ? 0 : b]; }

static int grow(Work *w, i64 cap) {
    double *rows = realloc(w->rows, sizeof(double) * cap * w->n);
    if (rows) w->rows = rows;
    double *inverse = malloc(sizeof(double) * cap * cap);
    double *vectors = malloc(sizeof(double) * cap * 4);
    i64 *held = realloc(w->held, sizeof(i64) * cap);
    if (held) w->held = held;
    if (!rows || !inverse || !vectors || !held) {
        free(inverse);
        free(vectors);
        return 0;
    }
    for (i64 i = 0; i < w->k; i++)
        memcpy(inverse + i * cap, w->inverse + i * w->cap, sizeof(double) * w->k);
    for (i64 part = 0; part < 4 && w->multipliers; part++)
        memcpy(vectors + part * cap, w->multipliers + part * w->cap, sizeof(double) * w->k);
    free(w->inverse);
    free(w->multipliers);
    w->inverse = inverse;
    w->multipliers = vectors;
    w->rate = vectors + cap;
    w->column = vectors + 2 * cap;
    w->right = vectors + 3 * cap;
    w->cap = cap;
    return 1;
}

/* Row q of M between constraints of unit length. */
static void row_of(const Shared *s, const double *own, const Work *w, i64 q, double *restrict row) {
    const double *restrict scale = w->scale;
    i64 n = w->n;
    if (s->grams) {
        const double *restrict from = w->gram + q * n;
        double mine = scale[q];
        for (i64 j = 0; j < n; j++) row[j] = from[j] * (mine * scale[j]);
    } else if (s->classes) {
        const double *restrict from = s->matrix + q * n;
        double far = own[q], half = scale[q] / 2;
        for (i64 j = 0; j < n; j++) row[j] = (own[j] + (far - from[j])) * (scale[j] * half);
    } else {
        const double *restrict from = own + q * n;
        double mine = scale[q];
        for (i64 j = 0; j < n; j++) row[j] = from[j] * (mine * scale[j]);
    }
}

/* Rates and curvature without what earlier exchanges left of rounding in the inverse. */
static double checked(Work *w, i64 q) {
    i64 k = w->k;
    double curvature = 1.0, size = 1.0;
    for (i64 i = 0; i < k; i++) {
        double sum = w->column[i];
        for (i64 j = 0; j < k; j++) sum -= w->rows[i * w->n + w->held[j]] * w->rate[j];
        w->right[i] = sum;
    }
    double terms = w->scale[q], errors = w->error[q];
    for (i64 i = 0; i < k; i++) {
        const double *inverse = w->inverse + i * w->cap;
        for (i64 j = 0; j < k; j++) w->rate[i] += inverse[j] * w->right[j];
        double rate = fabs(w->rate[i]);
        size += rate;
        terms += rate * w->scale[w->held[i]];
        errors += rate * w->error[w->held[i]];
    }
    for (i64 i = 0; i < k; i++) {
        double sum = -2 * w->column[i];
        for (i64 j = 0; j < k; j++) sum += w->rows[i * w->n + w->held[j]] * w->rate[j];
        curvature += w->rate[i] * sum;
    }
    return curvature > EPSILON * size * size + NOISE * terms * errors ? curvature : 0.0;
}

/* rate = inverse column, in the order of pivots.py; returns the curvature 1 - rate column. */
static double rates(Work *w, i64 q) {
    i64 k = w->k;
    double curvature = 1.0;
    for (i64 i = 0; i < k; i++) {
        const double *inverse = w->inverse + i * w->cap;
        double sum = 0;
        for (i64 j = 0; j < k; j++) sum += inverse[j] * w->column[j];
        w->rate[i] = sum;
        curvature -= sum * w->column[i];
    }
    return curvature < SUSPECT || w->doubt ? checked(w, q) : curvature;
}

/* Constraint q, of which row and rate are at hand, joins the active set; 0 without memory. */
static int join(Work *w, i64 q, double curvature, double multiplier) {
    i64 k = w->k;
    if (k == w->cap && !grow(w, 2 * w->cap)) return 0;
    double share = 1 / curvature;
    w->doubt |= curvature < SUSPECT;
    for (i64 i = 0; i < k; i++) {
        double *inverse = w->inverse + i * w->cap, part = w->rate[i] * share;
        for (i64 j = 0; j < k; j++) inverse[j] += part * w->rate[j];
        inverse[k] = w->inverse[k * w->cap + i] = -part;
    }
    w->inverse[k * w->cap + k] = share;
    memcpy(w->rows + k * w->n, w->row, sizeof(double) * w->n);
    w->held[k] = q;
    w->multipliers[k] = multiplier;
    w->k++;
    return 1;
}

/* The constraint in a slot leaves it; the last one moves there. */
static void leave(Work *w, i64 slot) {
    i64 k = --w->k, cap = w->cap;
    double *own = w->right;
    memcpy(own, w->inverse + slot * cap, sizeof(double) * (k + 1));
    for (i64 i = 0; i <= k; i++) {
        double *inverse = w->inverse + i * cap, part = own[i] / own[slot];
        for (i64 j = 0; j <= k; j++) inverse[j] -= part * own[j];
    }
    if (slot == k) return;
    memcpy(w->inverse + slot * cap, w->inverse + k * cap, sizeof(double) * (k + 1));
    for (i64 i = 0; i < k; i++) w->inverse[i * cap + slot] = w->inverse[i * cap + k];
    w->inverse[slot * cap + slot] = w->inverse[slot * cap + k];
    memcpy(w->rows + slot * w->n, w->rows + k * w->n, sizeof(double) * w->n);
    w->held[slot] = w->held[k];
    w->multipliers[slot] = w->multipliers[k];
}

static void begin(Work *w) {
    w->k = w->doubt = 0;
    for (i64 j = 0; j < w->n; j++) {
        w->slack[j] = -w->unit[j];
        w->tolerance[j] = SATISFIED * (1 + fabs(w->unit[j]));
    }
}

/* multipliers = M_AA^-1 right with one step of refinement, right in units. */
static void solve_active(Work *w, const double *right, double *multipliers) {
    i64 k = w->k;
    double *rest = w->right;
    for (i64 i = 0; i < k; i++) {
        multipliers[i] = 0;
        for (i64 j = 0; j < k; j++) multipliers[i] += w->inverse[i * w->cap + j] * right[j];
    }
    for (i64 i = 0; i < k; i++) {
        rest[i] = right[i];
        for (i64 j = 0; j < k; j++) rest[i] -= w->rows[i * w->n + w->held[j]] * multipliers[j];
    }
    for (i64 i = 0; i < k; i++)
        for (i64 j = 0; j < k; j++) multipliers[i] += w->inverse[i * w->cap + j] * rest[j];
}

/* z_t - z_l of the other classes, ascending, from logits; of two classes from their difference; of
 * several variables 0 where nothing is to be met. */
static double margin(const Shared *s, const Work *w, i64 target, const double *readings, i64 l) {
    if (!s->weight) return readings[l];
    if (s->variables) {
        i64 pair = w->pair[l], asked = w->kind[l] == WRITTEN || w->kind[l] == WITHIN;
        return asked ? readings[s->plus[pair]] - readings[s->minus[pair]] : 0;
    }
    if (s->classes == 2) return target ? -readings[0] : readings[0];
    return readings[target] - readings[l + (l >= target)];
}

/* Take the constraints of positive multipliers into the active set, but those that depend on others:
 * 0 without memory. */
static int recover(const Shared *s, const double *own, Work *w, const double *start, i64 target) {
    for (i64 l = 0; l < s->m; l++) {
        if (!(start[l] > 0)) continue;
        i64 q = s->classes && l >= target ? l + 1 : l;
        if (!(w->unit[q] > -INFINITY)) continue;
        row_of(s, own, w, q, w->row);
        for (i64 i = 0; i < w->k; i++) w->column[i] = w->row[w->held[i]];
        double curvature = rates(w, q);
        if (curvature > SUSPECT && !join(w, q, curvature, 0)) return 0;
    }
    return 1;
}

/* Multipliers and slacks of the active set that is held. Those below zero leave it, so that it solves
 * a part of the problem, from which the steps go on. */
static void settle(Work *w) {
    while (w->k) {
        i64 least = 0;
        for (i64 i = 0; i < w->k; i++) w->column[i] = w->unit[w->held[i]];
        solve_active(w, w->column, w->multipliers);
        for (i64 i = 1; i < w->k; i++)
            if (w->multipliers[i] < w->multipliers[least]) least = i;
        if (w->multipliers[least] >= 0) break;
        leave(w, least);
    }
    for (i64 i = 0; i < w->k; i++) {
        const double *restrict row = w->rows + i * w->n;
        double part = w->multipliers[i];
        for (i64 j = 0; j < w->n; j++) w->slack[j] += part * row[j];
    }
    for (i64 i = 0; i < w->k; i++) w->slack[w->held[i]] = 0;
}

/* The steps of _Alone.run: verdict bits, or -1 without memory. */
static int run(const Shared *s, const double *own, Work *w, i64 max_pivots) {
    i64 n = w->n, entering = -1;
    double share = 0;
    for (i64 pivot = 0; pivot <= max_pivots; pivot++) {
        i64 q = entering;
        if (q < 0) {
            double worst = INFINITY;
            q = 0;
            for (i64 j = 0; j < n; j++) {
                double value = w->slack[j] + w->tolerance[j];
                if (value < worst) worst = value, q = j;
            }
            share = 0;
            if (!(worst < 0)) return FEASIBLE | CONVERGED;
            row_of(s, own, w, q, w->row);
        }
        i64 k = w->k, leaving = -1;
        for (i64 i = 0; i < k; i++) w->column[i] = w->row[w->held[i]];
        double curvature = rates(w, q);
        double full = curvature > DEPENDENT ? -w->slack[q] / curvature : INFINITY;
        double block = INFINITY, largest = 0;
        for (i64 i = 0; i < k; i++) largest = larger(largest, fabs(w->rate[i]));
        for (i64 i = 0; i < k; i++) {
            if (!(w->rate[i] > NO_DIRECTION * (1 + largest))) continue;
            double end = w->multipliers[i] / w->rate[i];
            if (end < block) block = end, leaving = i;
        }
        double step = larger((full < block ? full : block), 0.0);
        if (step == INFINITY) {
            /* A ray of the dual, unless what it gains is rounding: then whoever reads back sees. */
            double sizes = w->tolerance[q];
            for (i64 i = 0; i < k; i++) sizes += fabs(w->rate[i]) * w->tolerance[w->held[i]];
            int proven = -w->slack[q] > PROVEN / SATISFIED * sizes;
            w->unit[q] = -INFINITY;
            begin(w);
            entering = -1;
            if (proven) return CONVERGED;
            continue;
        }
        for (i64 i = 0; i < k; i++) w->multipliers[i] = larger(w->multipliers[i] - step * w->rate[i], 0.0);
        share += step;
        double *restrict slack = w->slack;
        for (i64 j = 0; j < n; j++) slack[j] += step * w->row[j];
        for (i64 i = 0; i < k; i++) {
            const double *restrict row = w->rows + i * n;
            double part = step * w->rate[i];
            for (i64 j = 0; j < n; j++) slack[j] -= part * row[j];
        }
        if (full <= block) {
            if (!join(w, q, curvature, share)) return -1;
            entering = -1;
        } else {
            leave(w, leaving);
            entering = q;
        }
        for (i64 i = 0; i < w->k; i++) slack[w->held[i]] = 0;
    }
    return FEASIBLE;
}

/* By the odds rule of m margins, which begin at a place; the source is negative where it is read. */
static double floor_of(i64 mirror, double log_odds, i64 m, i64 target, i64 source, const double *margins) {
    double least = INFINITY;
    if (!mirror) return log_odds;
    for (i64 l = 0; l < m; l++)
        if (!(margins[l] >= least)) least = margins[l];
    double belief = larger(-least, 0.0);
    if (source >= 0) {
        i64 rival = source - (source > target);
        rival = rival < 0 ? 0 : rival >= m ? m - 1 : rival;
        belief = source == target ? 0.0 : -margins[rival];
    }
    return larger(belief, log_odds);
}

static double ruled(const Task *t, i64 b, i64 m, i64 target, const double *margins) {
    i64 source = t->source ? t->source[t->one_source ? 0 : b] : FREE;
    if (t->asked) return t->asked[t->one_asked ? 0 : b];
    return floor_of(t->mirror, t->log_odds, m, target, source, margins);
}

/* What an example is to write and keep: M' = A'SA'^T, its noise, lengths, and A', as stacked.py has it. */
static void stack(const Shared *s, const Task *t, Work *w, i64 b) {
    i64 m = s->m;
    const i64 *choice = t->target + b * s->variables;
    if (!memcmp(w->chosen, choice, sizeof(i64) * s->variables)) return;
    memcpy(w->chosen, choice, sizeof(i64) * s->variables);
    w->kept = 0;
    for (i64 v = 0; v < s->variables; v++)
        for (i64 l = s->slots[v]; l < s->slots[v + 1]; l++) {
            i64 offset = l - s->slots[v], rivals = s->begins[v + 1] - s->begins[v] - 1;
            i64 kind = choice[v] == KEEP ? (s->tolerant[v] ? WITHIN : FIXED) : WRITTEN;
            if (choice[v] == FREE || (kind != WITHIN && offset >= rivals)) kind = NOTHING;
            w->kind[l] = kind;
            /* Equations compare neighbours, of which near-equal ones have a short row of their own. */
            i64 block = kind == FIXED ? offset : choice[v] < 0 ? 0 : choice[v];
            w->pair[l] = s->first[v] + (kind ? offset + block * rivals : 0);
            w->kept += kind == FIXED;
        }
    double *own = w->own, *combination = w->combination;
    for (i64 i = 0; i < m; i++) {
        const double *from = s->matrix + w->pair[i] * s->pairs;
        for (i64 j = 0; j < m; j++) own[i * m + j] = w->kind[i] && w->kind[j] ? from[w->pair[j]] : 0;
        w->noise[i] = s->noise[w->pair[i]] + (w->kept ? COMBINED * own[i * m + i] : 0);
        w->length[i] = s->length[w->pair[i]];
    }
    if (w->kept) memset(combination, 0, sizeof(double) * m * m);
    for (i64 i = 0; w->kept && i < m; i++) combination[i * m + i] = 1;
    /* First what stands out most from its rounding, which what it is taken out of inherits. */
    for (i64 done = 0; done < w->kept; done++) {
        i64 slot = -1;
        double most = 1;
        for (i64 i = 0; i < m; i++) {
            double over = w->kind[i] == FIXED ? own[i * m + i] / larger(w->noise[i], TINY) : 0;
            if (over > most) most = over, slot = i;
        }
        if (slot < 0) break;
        double pivot = own[slot * m + slot];
        const double *restrict row = own + slot * m, *restrict held = combination + slot * m;
        for (i64 i = 0; i < m; i++) {
            /* What was symmetric stays so: this is row i's part, too. */
            double part = i == slot ? 0 : row[i] / pivot;
            if (part == 0) continue;
            double *restrict into = own + i * m, *restrict kept = combination + i * m;
            for (i64 j = 0; j < m; j++) into[j] -= part * row[j];
            for (i64 j = 0; j < m; j++) kept[j] -= part * held[j];
            w->noise[i] += part * part * w->noise[slot];
        }
        memset(own + slot * m, 0, sizeof(double) * m);
        memset(combination + slot * m, 0, sizeof(double) * m);
    }
    for (i64 i = 0; i < m; i++) {
        int asked = w->kind[i] == WRITTEN || w->kind[i] == WITHIN;
        if (!asked) w->noise[i] = 1, w->length[i] = 0;
        for (i64 j = 0; j <= i; j++) {
            int both = asked && (w->kind[j] == WRITTEN || w->kind[j] == WITHIN);
            own[i * m + j] = own[j * m + i] = both ? (own[i * m + j] + own[j * m + i]) / 2 : 0;
        }
    }
}

/* Floors of all constraints by the rules of their variables, and what is read of these before. */
static void floors_of(const Shared *s, const Task *t, i64 b, const double *margins) {
    i64 count = s->variables;
    double *odds = t->odds + b * 4 * count;
    for (i64 v = 0; v < count; v++) {
        i64 at = s->slots[v], rivals = s->begins[v + 1] - s->begins[v] - 1, choice = t->target[b * count + v];
        const double *rule = t->rules + 4 * v, *own = margins + at;
        i64 source = t->source ? t->source[b * count + v] : FREE;
        double floor = NAN, least = choice < 0 ? NAN : INFINITY;
        if (choice >= 0) {
            floor = floor_of(rule[0] > 0, rule[1], rivals, choice, source, own) + rule[2];
            if (t->asked && !isnan(t->asked[b * count + v])) floor = t->asked[b * count + v];
        }
        for (i64 l = 0; l < s->slots[v + 1] - at; l++) {
            double always = choice == KEEP && s->tolerant[v] ? own[l] - rule[3] : -1;
            t->floor[b * s->m + at + l] = choice >= 0 && l < rivals ? floor : always;
            if (choice >= 0 && l < rivals && !(own[l] >= least)) least = own[l];
        }
        odds[v] = odds[count + v] = least;
        odds[2 * count + v] = floor;
        odds[3 * count + v] = 0;
    }
}

/* What is read of each variable afterwards, and how far its log odds moved. */
static void odds_of(const Shared *s, const Task *t, const Work *w, i64 b, const double *before,
                    const double *after) {
    i64 count = s->variables;
    double *odds = t->odds + b * 4 * count;
    for (i64 v = 0; v < count; v++) {
        double least = t->target[b * count + v] < 0 ? NAN : INFINITY, most = -INFINITY, fewest = INFINITY;
        for (i64 l = s->slots[v]; l < s->slots[v + 1]; l++)
            if (w->kind[l] == WRITTEN && !(margin(s, w, 0, after, l) >= least)) least = margin(s, w, 0, after, l);
        for (i64 k = s->begins[v]; k < s->begins[v + 1]; k++) {
            double change = after[k] - before[k];
            if (!(change <= most)) most = change;
            if (!(change >= fewest)) fewest = change;
        }
        odds[count + v] = least;
        odds[3 * count + v] = most - fewest;
    }
}

/* One problem of a task: solve it and certify. Returns the slots it needs + 1; 0 without memory.
 *
 * readings are margins, or logits of an activation of that size; verdict gets the bits above. When
 * it is asked again, it aims by w->raised and begins with the active set of its multipliers, or with
 * the one that is still in w. */
static i64 solve_one(const Shared *s, const Task *t, Work *w, i64 b, const double *readings,
                     double size, int again, int *verdict) {
    i64 m = s->m, n = w->n, target = s->classes ? target_of(t, b) : 0, all = t->count;
    if (s->variables) stack(s, t, w, b);
    const double *own = s->variables ? w->own : s->matrix + (s->classes ? target * n : b * n * n);
    const double *noise = s->variables ? w->noise : s->noise + (s->classes ? target * n : b * n);
    const double *length = s->variables ? w->length : s->length + target * n;
    double *multipliers = t->multipliers + b * m, *numbers = t->numbers + b;
    double *margins = w->grown, *floors = t->floor + b * t->each;
    w->gram = s->grams ? s->grams + target * n * n : NULL;
    double worst = -INFINITY, total = 0, least = INFINITY;
    int impossible = 0;
    for (i64 l = 0; l < m; l++) {
        margins[l] = margin(s, w, target, readings, l);
        if (!(margins[l] >= least)) least = margins[l];
    }
    if (s->variables && !again) floors_of(s, t, b, margins);
    if (t->ruled && !again) {
        floors[0] = ruled(t, b, m, target, margins);
    }
    for (i64 l = 0; l < m; l++) {
        double missing = floors[t->each == 1 ? 0 : l] - margins[l];
        worst = larger(worst, missing);
        total += missing;
    }
    /* Where nothing is written no margin tells of an activation that is none. */
    if (s->variables) total += 0 * size;
    *verdict = isfinite(total) ? VALID | (worst > 0 ? NEEDED : 0) : 0;
    for (i64 part = 0; part < 3; part++) numbers[part * all] = 0;
    if (t->each > 1) numbers[3 * all] = floors[0];
    numbers[4 * all] = numbers[5 * all] = least;
    for (i64 i = 0; i < t->slots; i++) t->index[b * t->slots + i] = m;
    if (t->inverse) memset(t->inverse + b * t->slots * t->slots, 0, sizeof(double) * t->slots * t->slots);
    if (again) memcpy(w->start, multipliers, sizeof(double) * m);
    memset(multipliers, 0, sizeof(double) * m);
    if (!(*verdict & NEEDED)) {
        *verdict |= FEASIBLE | CONVERGED;
        return 1;
    }

    /* Constraints of unit length, and gaps of which the largest is 1. */
    double largest = -INFINITY;
    for (i64 j = 0; j < n; j++) {
        i64 l = s->classes ? j - (j > target) : j;
        w->scale[j] = w->error[j] = 0;
        w->gap[j] = w->unit[j] = -INFINITY;
        if (s->classes && j == target) continue;
        double floor = floors[t->each == 1 ? 0 : l], raised = 0;
        if (again)
            raised = w->raised[l];
        else if (t->advance > 0)
            raised = t->advance * (length[j] * size + larger(floor - margins[l], 0));
        w->raised[l] = raised;
        if (t->aims) t->aims[b * m + l] = floor + raised;
        double gap = (floor + raised) - margins[l];
        double diagonal = s->classes ? own[j] : own[j * n + j];
        if (!(diagonal <= noise[j])) {
            w->scale[j] = 1 / sqrt(diagonal);
            w->error[j] = w->scale[j] * noise[j];
            w->gap[j] = w->unit[j] = gap * w->scale[j];
            largest = larger(largest, w->unit[j]);
        } else if (gap > 0) {
            impossible = 1;
        }
    }
    if (largest > 0)
        for (i64 j = 0; j < n; j++) w->unit[j] /= largest;
    i64 live = again == LIVE ? w->k : 0, doubt = again == LIVE && w->doubt;
    begin(w);
    w->k = live, w->doubt = doubt;
    int found = CONVERGED;
    if (!impossible) {
        if (again == RECOVER && !recover(s, own, w, w->start, target)) return 0;
        if (again) settle(w);
        found = run(s, own, w, t->max_pivots);
        if (found < 0) return 0;
    }
    *verdict |= found;

    /* Multipliers by the true gaps, and how far they are from optimal (solution.kkt_residual). */
    i64 k = w->k;
    for (i64 i = 0; i < k; i++) w->column[i] = w->gap[w->held[i]];
    solve_active(w, w->column, w->rate);
    memset(w->grown, 0, sizeof(double) * n);
    double grown = 0, balance = 0, moved = 0, rounds = 0;
    for (i64 i = 0; i < k; i++) {
        i64 q = w->held[i];
        double part = larger(w->rate[i], 0.0);
        w->rate[i] = part;
        rounds += EPSILON * part;
        multipliers[s->classes ? q - (q > target) : q] = part * w->scale[q];
        const double *restrict row = w->rows + i * n;
        for (i64 j = 0; j < n; j++) w->grown[j] += part * row[j];
    }
    for (i64 i = 0; i < k; i++) {
        i64 q = w->held[i];
        grown += w->rate[i] * w->grown[q];
        balance += w->rate[i] * (w->grown[q] - w->gap[q]);
    }
    double residual = 0;
    largest = larger(largest, TINY);
    for (i64 j = 0; j < n; j++)
        if (w->scale[j] > 0)
            residual = larger(residual, (w->gap[j] - w->grown[j] - rounds) / (largest + fabs(w->gap[j])));
    residual = larger(residual, (fabs(balance) - rounds * rounds / EPSILON) / larger(fabs(grown), TINY));
    if (s->stretch) {
        const double *from = s->stretch + target * n;
        for (i64 i = 0; i < k; i++)
            for (i64 j = 0; j < k; j++) {
                i64 p = w->held[i], q = w->held[j];
                double one = w->rate[i] * w->scale[p] * s->unit;
                double two = w->rate[j] * w->scale[q] * s->unit;
                moved += one * two * (from[p] + from[q] - s->stretch[p * n + q]) / 2;
            }
    }
    numbers[0] = residual;
    numbers[all] = grown;
    numbers[2 * all] = moved;
    if (t->slots && k <= t->slots) {
        i64 slots = t->slots;
        for (i64 i = 0; i < k; i++) {
            i64 q = w->held[i];
            t->index[b * slots + i] = s->classes ? q - (q > target) : q;
            for (i64 j = 0; t->inverse && j < k; j++)
                t->inverse[(b * slots + i) * slots + j] =
                    w->inverse[i * w->cap + j] * w->scale[q] * w->scale[w->held[j]];
        }
    }
    return k + 1;
}

/* One problem of total odds, see total_odds.py: of n classes, of which the target and those that nothing
 * moves begin at infinity; in units in which the longest normal has length 1. */
enum { TOTAL_VECTORS = 18 };
typedef struct Total {
    i64 n, most; /* and the rival of the largest share */
    double floor, *gram, *system, *factor;
    double *start, *noise, *found, *kept, *moved, *margins, *share, *residual, *back, *along, *pulled, *slope,
        *root, *spare, *gap, *best, *next, *shares;
} Total;

static double sum_of_products(const double *restrict a, const double *restrict b, i64 n) {
    double sum = 0;
    for (i64 i = 0; i < n; i++) sum += a[i] * b[i];
    return sum;
}

static void times(const Total *q, const double *vector, double *into) {
    for (i64 i = 0; i < q->n; i++) into[i] = sum_of_products(q->gram + i * q->n, vector, q->n);
}

/* log sum exp(-s). */
static double log_sum(const double *s, i64 n) {
    double least = INFINITY, sum = 0;
    for (i64 i = 0; i < n; i++)
        if (!(s[i] >= least)) least = s[i];
    if (!(least < INFINITY)) return -least;
    for (i64 i = 0; i < n; i++) sum += exp(least - s[i]);
    return log(sum) - least;
}

/* What is read where some multipliers are: M l, margins and the shares of rivals. */
static void look(Total *q, const double *multipliers) {
    times(q, multipliers, q->moved);
    for (i64 i = 0; i < q->n; i++) q->margins[i] = q->start[i] + q->moved[i];
    double most = log_sum(q->margins, q->n);
    for (i64 i = 0; i < q->n; i++) q->share[i] = exp(-q->margins[i] - most);
}

/* total_residual. */
static double residual_of(Total *q, const double *multipliers) {
    i64 n = q->n;
    double weight = 0, missing, *residual = q->residual;
    look(q, multipliers);
    for (i64 i = 0; i < n; i++) weight += multipliers[i];
    for (i64 i = 0; i < n; i++) residual[i] = multipliers[i] - weight * q->share[i];
    double length = sqrt(larger(sum_of_products(multipliers, q->moved, n), 0));
    times(q, q->share, q->spare);
    double nat = 1 / sqrt(larger(sum_of_products(q->share, q->spare, n), TINY));
    times(q, residual, q->spare);
    double unbalanced = sqrt(larger(sum_of_products(residual, q->spare, n), 0));
    missing = q->floor + log_sum(q->margins, n);
    missing = weight > 0 ? fabs(missing) : larger(missing, 0);
    /* What margins round by, and duality where shares are not those of the multipliers. */
    double terms = 0, rounds = 0, carried = 0, apart = 0;
    for (i64 i = 0; i < n; i++) terms += multipliers[i] * sqrt(larger(q->gram[i * n + i], 0));
    for (i64 i = 0; i < n; i++) {
        double root = sqrt(larger(q->gram[i * n + i], 0)), part = weight > 0 ? multipliers[i] / weight : 0;
        double own = q->share[i] > 0 ? EPSILON * q->share[i] * (fabs(q->start[i]) + root * terms) : 0;
        rounds += own, carried += weight * own * root;
        if (part > 0) apart += part * (log(part) - log(larger(q->share[i], TINY)));
    }
    apart = weight * apart / larger(length * length, TINY) - LONGER;
    missing = (missing - rounds) / (1 + fabs(q->floor + log_sum(q->start, n)));
    unbalanced = (unbalanced - carried) / (length + nat);
    missing = larger(larger(missing, apart), 0);
    return unbalanced > missing || isnan(unbalanced) ? unbalanced : missing;
}

/* The multipliers of the least edit that pairwise floors need: verdict bits, or -1 without memory. */
static int pairwise(const Shared *s, const Total *q, Work *w, i64 max_pivots, double *into) {
    i64 n = q->n, impossible = 0;
    double largest = -INFINITY;
    for (i64 j = 0; j < n; j++) {
        double diagonal = q->gram[j * n + j];
        w->scale[j] = w->error[j] = 0;
        w->gap[j] = w->unit[j] = -INFINITY;
        impossible |= diagonal <= q->noise[j] && q->gap[j] > 0;
        if (diagonal <= q->noise[j]) continue;
        w->scale[j] = 1 / sqrt(diagonal);
        w->error[j] = w->scale[j] * q->noise[j];
        w->gap[j] = w->unit[j] = q->gap[j] * w->scale[j];
        largest = larger(largest, w->unit[j]);
    }
    for (i64 j = 0; largest > 0 && j < n; j++) w->unit[j] /= largest;
    begin(w);
    w->gram = q->gram;
    int found = impossible ? CONVERGED : run(s, NULL, w, max_pivots);
    if (found < 0) return found;
    memset(into, 0, sizeof(double) * n);
    for (i64 i = 0; i < w->k; i++) w->column[i] = w->gap[w->held[i]];
    solve_active(w, w->column, w->rate);
    for (i64 i = 0; i < w->k; i++) into[w->held[i]] = larger(w->rate[i], 0) * w->scale[w->held[i]];
    return found;
}

/* Times I - c v v', v the roots of the shares but the largest: the square root of I - v v'. */
static void inside(const Total *q, double *column) {
    double part = sum_of_products(q->root, column, q->n) / (1 + sqrt(q->share[q->most]));
    for (i64 i = 0; i < q->n; i++) column[i] -= q->root[i] * part;
}

static int factored(const Total *q, double ridge) {
    i64 n = q->n;
    for (i64 i = 0; i < n; i++)
        for (i64 j = 0; j <= i; j++) {
            double *row = q->factor + i * n, *other = q->factor + j * n;
            double rest = q->system[i * n + j] + (i == j ? ridge : 0) - sum_of_products(row, other, j);
            if (i == j && !(rest > 0)) return 0;
            row[j] = i == j ? sqrt(rest) : rest / other[j];
        }
    return 1;
}

/* The factor by which systems of a Newton step at the shares are solved, see _solve_symmetric; 0 where
 * rounding allows none. */
static int prepare(Total *q, double weight) {
    i64 n = q->n, r = 0;
    double *system = q->system, largest = 0;
    const double *gram = q->gram;
    for (i64 i = 1; i < n; i++)
        if (q->share[i] > q->share[r]) r = i;
    q->most = r;
    for (i64 i = 0; i < n; i++) q->root[i] = i == r ? 0 : sqrt(q->share[i]);
    for (i64 i = 0; i < n; i++)
        for (i64 j = 0; j < n; j++) {
            double apart = gram[i * n + j] - gram[i * n + r] - (gram[r * n + j] - gram[r * n + r]);
            system[i * n + j] = q->root[i] * apart * q->root[j];
        }
    for (i64 i = 0; i < n; i++) inside(q, system + i * n);
    memset(q->spare, 0, sizeof(double) * n);
    for (i64 i = 0; i < n; i++)
        for (i64 j = 0; j < n; j++) q->spare[j] += q->root[i] * system[i * n + j];
    for (i64 i = 0; i < n; i++)
        for (i64 j = 0; j < n; j++) system[i * n + j] -= q->root[i] * (q->spare[j] / (1 + sqrt(q->share[r])));
    for (i64 i = 0; i < n; i++)
        for (i64 j = 0; j <= i; j++) {
            double both = weight * ((system[i * n + j] + system[j * n + i]) / 2) + (i == j);
            system[i * n + j] = system[j * n + i] = both;
            if (i == j) largest = larger(largest, fabs(both));
        }
    /* Rounding of large terms outweighs the identity; a longer diagonal makes a shorter step. */
    return factored(q, 0) || factored(q, RIDGE * largest);
}

static void solve_prepared(const Total *q, double weight, const double *right, double *into) {
    i64 n = q->n;
    double *own = q->spare;
    times(q, right, own);
    double most = own[q->most], total = 0;
    for (i64 i = 0; i < n; i++) own[i] = q->root[i] * (own[i] - most);
    inside(q, own);
    for (i64 i = 0; i < n; i++) own[i] = (own[i] - sum_of_products(q->factor + i * n, own, i)) / q->factor[i * n + i];
    for (i64 i = n - 1; i >= 0; i--) {
        own[i] /= q->factor[i * n + i];
        for (i64 j = 0; j < i; j++) own[j] -= q->factor[i * n + j] * own[i];
    }
    inside(q, own);
    for (i64 i = 0; i < n; i++) {
        double part = weight * q->root[i] * own[i];
        into[i] = right[i] - part;
        total += part;
    }
    into[q->most] += total;
}

/* _beyond_reach: whether the lower bound of the distance at the shares is infinite. */
static int beyond_reach(const Total *q) {
    double entropy = 0, reading = 0, lengths = 0, noises = 0, length = sum_of_products(q->share, q->slope, q->n);
    for (i64 i = 0; i < q->n; i++) {
        double share = q->share[i];
        if (!(share > 0)) continue;
        entropy -= share * log(share);
        reading += share * q->start[i];
        lengths += share * sqrt(larger(q->gram[i * q->n + i], 0));
        noises += share * sqrt(q->noise[i]);
    }
    double resolved = larger(CANCELLED * lengths * lengths, noises * noises);
    return q->floor - reading + entropy > 0 && length <= resolved;
}

/* _cancel: whether shares are found that prove a target out of reach; -1 without memory. */
static int cancel(const Shared *s, Total *q, Work *w, i64 max_pivots) {
    i64 n = q->n, finite = 0, lost = 0;
    for (i64 i = 0; i < n; i++) finite += isfinite(q->start[i]);
    for (i64 i = 0; i < n; i++) q->share[i] = isfinite(q->start[i]) ? 1.0 / finite : 0;
    for (i64 i = 0; i < n; i++) q->kept[i] = q->gram[i * n + i];
    for (i64 number = 0; number < PROOFS && lost == 0; number++) {
        double total = 0;
        for (i64 i = 0; i < n; i++)
            q->gap[i] = isfinite(q->start[i]) ? q->floor - log(larger(1e-300, q->share[i])) - q->start[i] : -1;
        for (i64 i = 0; i < n; i++) q->gram[i * n + i] += LENT * q->kept[i];
        if (pairwise(s, q, w, max_pivots, q->next) < 0) return -1;
        for (i64 i = 0; i < n; i++) q->gram[i * n + i] = q->kept[i];
        for (i64 i = 0; i < n; i++) total += q->next[i];
        for (i64 i = 0; i < n; i++) q->share[i] = q->next[i] / larger(total, TINY);
        times(q, q->share, q->slope);
        lost = beyond_reach(q);
    }
    return lost;
}

/* _line_search: the first of 1, 1/2, ... at which the convex function falls enough. */
static double stride_of(const Total *q, double weight, double decrement) {
    i64 n = q->n;
    double linear = sum_of_products(q->moved, q->back, n), square = sum_of_products(q->back, q->pulled, n), stride = 1;
    double before = log_sum(q->margins, n);
    for (i64 number = 0; number < MAX_HALVINGS; number++) {
        for (i64 i = 0; i < n; i++) q->spare[i] = q->margins[i] - stride * q->pulled[i];
        double fall = stride * linear - stride * stride * square / 2 - weight * (log_sum(q->spare, n) - before);
        double rounding = 1e-14 * (1 + fabs(stride * linear) + weight * (1 + fabs(before)));
        if (fall >= 1e-4 * stride * decrement - rounding) break;
        stride /= 2;
    }
    return stride;
}

/* _Search: found holds the multipliers to begin with, and then those of the least edit. Returns verdict
 * bits, and the weight of the one constraint. */
static int search(Total *q, double *total) {
    i64 n = q->n;
    double low = 0, high = INFINITY, weight = *total, *found = q->found;
    for (i64 number = 0; number < MAX_STEPS; number++) {
        look(q, found);
        for (i64 i = 0; i < n; i++) q->residual[i] = found[i] - weight * q->share[i];
        if (!prepare(q, weight)) break;
        solve_prepared(q, weight, q->residual, q->back);
        solve_prepared(q, weight, q->share, q->along);
        times(q, q->back, q->pulled);
        times(q, q->share, q->slope);
        double decrement = larger(sum_of_products(q->residual, q->pulled, n), 0), distance = larger(sum_of_products(found, q->moved, n), 0);
        double missing = q->floor + log_sum(q->margins, n), size = 1 + fabs(q->floor);
        for (i64 i = 0; i < n; i++) {
            double terms = fabs(q->start[i]);
            if (!(q->share[i] > 0)) continue;
            for (i64 j = 0; j < n; j++) terms += fabs(q->gram[i * n + j]) * fabs(found[j]);
            size += q->share[i] * terms;
        }
        double pending = sum_of_products(q->slope, q->back, n), rate = larger(sum_of_products(q->slope, q->along, n), TINY);
        int settled = decrement <= SETTLED * (1 + distance);
        settled &= fabs(pending) <= larger(fabs(missing) / 10, 1e-13 * size);
        times(q, q->residual, q->spare);
        double unbalanced = larger(sum_of_products(q->residual, q->spare, n), 0);
        *total = weight;
        if (settled && fabs(missing) <= MET * size && unbalanced <= BALANCED * BALANCED * (1 + distance))
            return FEASIBLE | CONVERGED;
        if (beyond_reach(q)) return CONVERGED;
        if (settled && missing > 0) low = weight;
        if (settled && missing <= 0) high = weight;
        if (settled) {
            double proposed = weight + (missing + pending) / rate, bounded = isfinite(high);
            double limit = bounded ? high : GROWTH * weight;
            double middle = bounded ? (low > 0 ? sqrt(low * high) : high / GROWTH) : limit;
            double change = (proposed > low && proposed < limit ? proposed : middle) - weight;
            for (i64 i = 0; i < n; i++) found[i] += change * q->along[i] - q->back[i];
            weight += change;
        } else {
            double stride = stride_of(q, weight, decrement);
            for (i64 i = 0; i < n; i++) found[i] -= stride * q->back[i];
        }
    }
    *total = weight;
    return FEASIBLE;
}

/* _by_shares: multipliers of pairwise edits whose floors are those of the last one's shares; their
 * residual, or -1 without memory. */
static double by_shares(const Shared *s, Total *q, Work *w, i64 max_pivots) {
    i64 n = q->n, finite = 0;
    double least = INFINITY;
    for (i64 i = 0; i < n; i++) finite += isfinite(q->start[i]);
    for (i64 i = 0; i < n; i++) q->shares[i] = isfinite(q->start[i]) ? 1.0 / finite : 0;
    for (i64 number = 0; number < SHARE_ROUNDS; number++) {
        double total = 0, sum = 0;
        for (i64 i = 0; i < n; i++)
            q->gap[i] = isfinite(q->start[i]) ? q->floor - log(q->shares[i]) - q->start[i] : -1;
        if (pairwise(s, q, w, max_pivots, q->next) < 0) return -1;
        double met = residual_of(q, q->next);
        if (met < least) {
            least = met;
            memcpy(q->best, q->next, sizeof(double) * n);
        }
        for (i64 i = 0; i < n; i++) total += q->next[i];
        for (i64 i = 0; i < n; i++) {
            double share = q->next[i] > 0 ? q->next[i] / larger(total, TINY) : exp(q->floor - q->margins[i]);
            q->shares[i] = share > 1 ? 1 : larger(1e-300, share);
            sum += q->shares[i];
        }
        for (i64 i = 0; i < n; i++) q->shares[i] /= sum;
    }
    return least;
}

/* The multipliers of a problem and its verdict bits; -1 without memory. */
static int solve_total(const Shared *s, Total *q, Work *w, i64 max_pivots, double *residual) {
    i64 n = q->n, some = 0, others = 0;
    double scale = TINY, weight = 0;
    /* Rivals that nothing moves leave less for the others, whose floor rises. */
    for (i64 i = 0; i < n; i++) q->spare[i] = INFINITY;
    for (i64 i = 0; i < n; i++) {
        if (!(q->start[i] < INFINITY)) continue;
        int constant = q->gram[i * n + i] <= q->noise[i];
        if (constant) q->spare[i] = q->start[i], q->start[i] = INFINITY;
        some |= constant;
        others |= !constant;
    }
    if (some) {
        double share = q->floor + log_sum(q->spare, n);
        if (!(share < 0) || !others) return CONVERGED;
        q->floor -= log(-expm1(share));
    }
    for (i64 i = 0; i < n; i++) scale = larger(scale, q->gram[i * n + i]);
    for (i64 i = 0; i < n * n; i++) q->gram[i] /= scale;
    for (i64 i = 0; i < n; i++) q->noise[i] /= scale;

    /* Begin at the edit that pairwise odds of (K - 1) alpha need, which is sufficient; where those of
     * alpha are out of reach, so are total odds. */
    for (i64 i = 0; i < n; i++)
        q->gap[i] = isfinite(q->start[i]) ? q->floor - q->start[i] + log((double)(n - 1)) : -1;
    int verdict = pairwise(s, q, w, max_pivots, q->found);
    if (verdict >= 0 && !(verdict & FEASIBLE)) {
        for (i64 i = 0; i < n; i++) q->gap[i] = isfinite(q->start[i]) ? q->floor - q->start[i] : -1;
        verdict = pairwise(s, q, w, max_pivots, q->next);
        if (verdict >= 0 && !(verdict & FEASIBLE)) return verdict;
        int lost = verdict < 0 ? 0 : cancel(s, q, w, max_pivots);
        if (lost) return lost < 0 ? lost : CONVERGED;
        memset(q->found, 0, sizeof(double) * n);
        look(q, q->found);
        times(q, q->share, q->slope);
        weight = (q->floor + log_sum(q->start, n)) / larger(sum_of_products(q->share, q->slope, n), TINY);
        weight = weight < 0 ? 0 : weight > 1e12 ? 1e12 : weight;
    }
    if (verdict < 0) return verdict;
    for (i64 i = 0; i < n; i++) weight += q->found[i];
    verdict = 0;
    if (residual_of(q, q->found) > FAR) {
        double met = by_shares(s, q, w, max_pivots);
        if (met < 0) return -1;
        if (met <= MET_BY_SHARES) verdict = FEASIBLE | CONVERGED;
        /* Else it is a better place to begin at. */
        weight = 0;
        for (i64 i = 0; i < n; i++) weight += q->found[i] = q->best[i];
    }
    if (!verdict) verdict = search(q, &weight);
    if (!(verdict & FEASIBLE)) return verdict;
    for (i64 i = 0; i < n; i++) q->found[i] = larger(q->found[i], 0.0);

    /* Two steps of Newton's for both polish what was found, unless rounding spoils them. */
    *residual = residual_of(q, q->found);
    memcpy(q->kept, q->found, sizeof(double) * n);
    for (i64 number = 0; number < 2; number++) {
        look(q, q->kept);
        for (i64 i = 0; i < n; i++) q->residual[i] = q->kept[i] - weight * q->share[i];
        if (!prepare(q, weight)) break;
        solve_prepared(q, weight, q->residual, q->back);
        solve_prepared(q, weight, q->share, q->along);
        times(q, q->share, q->slope);
        double missing = q->floor + log_sum(q->margins, n) + sum_of_products(q->slope, q->back, n);
        double step = missing / sum_of_products(q->slope, q->along, n);
        for (i64 i = 0; i < n; i++) q->kept[i] += step * q->along[i] - q->back[i];
        weight += step;
    }
    for (i64 i = 0; i < n; i++) q->kept[i] = larger(q->kept[i], 0);
    double polished = residual_of(q, q->kept);
    if (polished <= *residual) {
        *residual = polished;
        memcpy(q->found, q->kept, sizeof(double) * n);
    }
    for (i64 i = 0; i < n; i++) q->found[i] /= scale;
    return verdict;
}

/* solve_one for total odds. */
static i64 total_one(const Shared *s, const Task *t, Work *w, i64 b, const double *readings, double size,
                     int again, int *verdict) {
    i64 m = s->m, n = w->n, target = target_of(t, b), all = t->count;
    double *multipliers = t->multipliers + b * m, *numbers = t->numbers + b, *floors = t->floor + b;
    Total *q = w->total;
    double longest = 0, residual = 0, squared = 0, moved = 0;
    for (i64 l = 0; l < m; l++) {
        w->grown[l] = q->start[l + (l >= target)] = margin(s, w, target, readings, l);
        longest = larger(longest, s->length[target * n + l + (l >= target)]);
    }
    q->start[target] = INFINITY;
    if (t->ruled && !again) *floors = ruled(t, b, m, target, w->grown);
    double before = -log_sum(q->start, n), missing = *floors - before;
    *verdict = isfinite(missing) ? VALID | (missing > 0 ? NEEDED : 0) : 0;
    for (i64 part = 0; part < 3; part++) numbers[part * all] = 0;
    numbers[4 * all] = numbers[5 * all] = before;
    memset(multipliers, 0, sizeof(double) * m);
    for (i64 i = 0; i < t->slots; i++) t->index[b * t->slots + i] = m;
    if (!again) w->raised[0] = *verdict & NEEDED ? t->advance * (longest * size + larger(missing, 0)) : 0;
    q->floor = *floors + w->raised[0];
    for (i64 l = 0; t->aims && l < m; l++) t->aims[b * m + l] = q->floor;
    if (!(*verdict & NEEDED)) {
        *verdict |= FEASIBLE | CONVERGED;
        return 1;
    }
    memcpy(q->gram, s->grams + target * n * n, sizeof(double) * n * n);
    memcpy(q->noise, s->noise + target * n, sizeof(double) * n);
    int found = solve_total(s, q, w, t->max_pivots, &residual);
    if (found < 0) return 0;
    *verdict |= found;
    if (!(found & FEASIBLE)) return 1;
    if (residual <= t->tolerance) *verdict |= CONVERGED;
    const double *gram = s->grams + target * n * n, *from = s->stretch + target * n;
    for (i64 i = 0; i < n; i++) {
        double row = 0;
        for (i64 j = 0; j < n; j++) {
            row += gram[i * n + j] * q->found[j];
            moved += q->found[i] * s->unit * (q->found[j] * s->unit) * (from[i] + from[j] - s->stretch[i * n + j]) / 2;
        }
        squared += q->found[i] * row;
        if (i != target) multipliers[i - (i > target)] = q->found[i];
    }
    numbers[0] = residual;
    numbers[all] = squared;
    numbers[2 * all] = moved;
    return 1;
}

/* Activations in the dtypes of torch, a block of rows at a time in float64. */
enum { BLOCK = 4 };
typedef enum { FLOAT64, FLOAT32, BFLOAT16, FLOAT16 } Kind;
typedef double Lanes __attribute__((vector_size(64)));

static uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

static float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static float from_half(uint16_t half) {
    float value = float_of((uint32_t)(half & 0x7fff) << 13) * 0x1p112f;
    uint32_t bits = bits_of(value) | (value >= 65536.0f ? 0x7f800000u : 0u);
    return float_of(bits | (uint32_t)(half & 0x8000) << 16);
}

static uint16_t to_half(float value) {
    uint32_t sign = bits_of(value) >> 16 & 0x8000, bits = bits_of(value) & 0x7fffffff, half;
    uint32_t normal = (bits + 0xfff + (bits >> 13 & 1) - 0x38000000) >> 13;
    uint32_t small = bits_of(float_of(bits) + 0.5f) - 0x3f000000;
    half = bits < 0x38800000 ? small : normal;
    half = bits >= 0x477ff000 ? 0x7c00 : half;
    return (uint16_t)(sign | (bits > 0x7f800000 ? 0x7e00 : half));
}

static uint16_t to_bfloat(float value) {
    uint32_t bits = bits_of(value);
    uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return (uint16_t)((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

static void load(const void *from, i64 kind, i64 n, double *restrict into) {
    const uint16_t *halves = from;
    if (kind == FLOAT64) memcpy(into, from, sizeof(double) * n);
    if (kind == FLOAT32)
        for (i64 j = 0; j < n; j++) into[j] = ((const float *)from)[j];
    if (kind == BFLOAT16)
        for (i64 j = 0; j < n; j++) into[j] = float_of((uint32_t)halves[j] << 16);
    if (kind == FLOAT16)
        for (i64 j = 0; j < n; j++) into[j] = from_half(halves[j]);
}

/* Round to the dtype as torch does, and leave in values what was rounded to. */
static void store(double *values, i64 kind, i64 n, void *into) {
    uint16_t *halves = into;
    if (kind == FLOAT64 && into != values) memcpy(into, values, sizeof(double) * n);
    if (kind == FLOAT32)
        for (i64 j = 0; j < n; j++) values[j] = ((float *)into)[j] = (float)values[j];
    if (kind == BFLOAT16)
        for (i64 j = 0; j < n; j++) {
            halves[j] = to_bfloat((float)values[j]);
            values[j] = float_of((uint32_t)halves[j] << 16);
        }
    if (kind == FLOAT16)
        for (i64 j = 0; j < n; j++) {
            halves[j] = to_half((float)values[j]);
            values[j] = from_half(halves[j]);
        }
}

static i64 place_of(const Task *t, i64 b) { return t->place ? t->place[b] : b; }

static i64 bytes_of(i64 kind) { return kind == FLOAT64 ? 8 : kind == FLOAT32 ? 4 : 2; }

static Lanes lanes(const double *from) {
    Lanes values;
    memcpy(&values, from, sizeof values);
    return values;
}

static double sum_of(Lanes v) {
    return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
}

/* Logits of some rows for some classes at once. The order of each sum is that of every other row and
 * class, so that an activation reads the same in any company. */
static inline __attribute__((always_inline)) void read_some(
    const Shared *s, double *const *x, double *restrict logits, i64 k, const i64 count, const i64 some) {
    i64 d = s->width, whole = d - d % 8;
    const double *weight = s->weight + k * d;
    Lanes sums[BLOCK][4] = {{{0}}};
    for (i64 j = 0; j < whole; j += 8) {
        Lanes rows[BLOCK];
        for (i64 b = 0; b < count; b++) rows[b] = lanes(x[b] + j);
        for (i64 part = 0; part < some; part++) {
            Lanes own = lanes(weight + part * d + j);
            for (i64 b = 0; b < count; b++) sums[b][part] += rows[b] * own;
        }
    }
    for (i64 b = 0; b < count; b++)
        for (i64 part = 0; part < some; part++) {
            double sum = sum_of(sums[b][part]);
            for (i64 j = whole; j < d; j++) sum += x[b][j] * weight[part * d + j];
            logits[b * s->rows + k + part] = sum + s->bias[k + part];
        }
}

/* Logits of one row. */
static void read_row(const Shared *s, double *const *x, double *logits) {
    i64 k = 0;
    for (; k + 4 <= s->rows; k += 4) read_some(s, x, logits, k, 1, 4);
    for (; k < s->rows; k++) read_some(s, x, logits, k, 1, 1);
}

/* And of a block of rows, (BLOCK, R), of which so many count: each sum is added up in the same order. */
static void read_block(const Shared *s, double *const *x, double *logits, i64 count) {
    i64 k = 0;
    if (count == 1) {
        read_row(s, x, logits);
        return;
    }
#ifdef __AVX512F__
    for (; k + 4 <= s->rows; k += 4) read_some(s, x, logits, k, BLOCK, 4);
#endif
    for (; k + 2 <= s->rows; k += 2) read_some(s, x, logits, k, BLOCK, 2);
    for (; k < s->rows; k++) read_some(s, x, logits, k, BLOCK, 1);
}

static double norm_of(const double *restrict x, const double *restrict y, i64 d) {
    Lanes sums = {0};
    double sum = 0;
    i64 j = 0;
    for (; j + 8 <= d; j += 8) {
        Lanes values = lanes(x + j);
        if (y) values -= lanes(y + j);
        sums += values * values;
    }
    for (; j < d; j++) sum += (x[j] - (y ? y[j] : 0)) * (x[j] - (y ? y[j] : 0));
    return sqrt(sum_of(sums) + sum);
}

/* edited = x + c W S. */
static void displace(const Shared *s, const Work *w, const double *restrict x, double *restrict edited) {
    i64 d = s->width, begun = 0, most = 0;
    if (s->variables && s->low) {
        /* Along the difference of each slot's pair. */
        memcpy(edited, x, sizeof(double) * d);
        for (i64 l = 0; l < s->m; l++) {
            i64 p = s->plus[w->pair[l]] * d, n = s->minus[w->pair[l]] * d;
            double part = w->share[l];
            for (i64 j = 0; part != 0 && j < d; j++)
                edited[j] += part * ((s->steering[p + j] - s->steering[n + j]) + (s->low[p + j] - s->low[n + j]));
        }
        return;
    }
    for (i64 k = 1; s->low && k < s->rows; k++)
        if (w->coefficients[k] > w->coefficients[most]) most = k;
    for (i64 k = 0; k < s->rows; k++) {
        const double *restrict steering = s->steering + k * d;
        double part = w->coefficients[k];
        if (part == 0 && (begun || k + 1 < s->rows)) continue;
        const double *from = begun ? edited : x;
        if (s->low) {
            /* Coefficients add up to 0: along differences to the target, which keep their digits. */
            const double *restrict target = s->steering + most * d, *restrict low = s->low + most * d;
            for (i64 j = 0; j < d; j++)
                edited[j] = from[j] + part * ((steering[j] - target[j]) + (s->low[k * d + j] - low[j]));
            begun = 1;
            continue;
        }
        for (i64 j = 0; j < d; j++) edited[j] = from[j] + part * steering[j];
        begun = 1;
    }
}

/* The coefficients of an example's multipliers. */
static void recall(const Shared *s, Work *w, i64 b, const Task *t) {
    i64 target = target_of(t, b), m = s->m;
    const double *multipliers = t->multipliers + b * m, *share = multipliers;
    memset(w->coefficients, 0, sizeof(double) * (s->variables ? s->rows : w->n));
    if (s->variables) {
        if (w->kept) {
            /* Multipliers of what is kept follow from those of the others. */
            memset(w->grown, 0, sizeof(double) * m);
            for (i64 l = 0; l < m; l++)
                for (i64 j = 0; multipliers[l] != 0 && j < m; j++)
                    w->grown[j] += multipliers[l] * w->combination[l * m + j];
            share = w->grown;
        }
        w->share = share;
        for (i64 l = 0; l < m; l++) {
            w->coefficients[s->plus[w->pair[l]]] += share[l];
            w->coefficients[s->minus[w->pair[l]]] -= share[l];
        }
        return;
    }
    if (s->classes == 2) {
        w->coefficients[0] = target ? -multipliers[0] : multipliers[0];
        return;
    }
    for (i64 l = 0; l < s->m; l++) {
        w->coefficients[l + (l >= target)] = -multipliers[l];
        w->coefficients[target] += multipliers[l];
    }
}

/* base + scale * written, each step rounded to the dtype; memory is for one row of it. */
static void add_base(const Task *t, i64 d, double *restrict written, const double *restrict base, void *memory) {
    if (t->scale != 1) {
        double scale = t->kind == FLOAT64 ? t->scale : (float)t->scale;
        for (i64 j = 0; j < d; j++) written[j] *= scale;
        store(written, t->kind, d, memory);
    }
    for (i64 j = 0; j < d; j++) written[j] += base[j];
    store(written, t->kind, d, memory);
}

/* Edit a row, and leave in held what the stream holds of it when it is put in place. */
static void move(const Shared *s, const Task *t, Work *w, i64 b, const double *x, double *held,
                 double *space) {
    i64 d = s->width;
    char *result = (char *)t->result + place_of(t, b) * d * bytes_of(t->kind);
    recall(s, w, b, t);
    displace(s, w, x, held);
    if (s->variables) {
        double moved = norm_of(held, x, d);
        t->numbers[2 * t->count + b] = moved * moved;
    }
    store(held, t->kind, d, result);
    if (!t->base) return;
    /* As Placement does: written = (x' - base) / scale, held = base + scale * written, each rounded
     * to the dtype. The result's memory serves for rounding and gets its values back. */
    double *restrict base = space, *restrict rounded = space + d;
    load((const char *)t->base + place_of(t, b) * t->base_stride * bytes_of(t->kind), t->kind, d, base);
    memcpy(rounded, held, sizeof(double) * d);
    for (i64 j = 0; j < d; j++) held[j] = (held[j] - base[j]) / t->scale;
    store(held, t->kind, d, result);
    /* In a stream it is what is written that stays there. */
    char *memory = t->within ? (char *)(space + d) : result;
    add_base(t, d, held, base, memory);
    if (!t->within) store(rounded, t->kind, d, result);
}

/* reach.excess: by how much more than rounding explains an edit may be longer than the least. */
static double excess_of(const Shared *s, const Task *t, Work *w, i64 b, const double *after, double least,
                        double size, const double *x, const double *held, double *space) {
    i64 m = s->m, d = s->width, target = target_of(t, b);
    const double *multipliers = t->multipliers + b * m, *floors = t->floor + b * t->each;
    const double *length = s->length + target * s->classes;
    double squared = larger(t->numbers[t->count + b], TINY), gap = 0, reach = 0, weight = 0;
    /* What is read of two classes is their one difference, of which the edit is the least. */
    if (s->classes == 2) return 0;
    for (i64 l = 0; l < m; l++) {
        if (!(multipliers[l] > 0)) continue;
        reach += multipliers[l] * (s->variables ? w->length[l] : length[l + (l >= target)]);
        weight += multipliers[l];
        if (!t->total)
            gap += multipliers[l] *
                   larger(margin(s, w, target, after, l) - floors[t->each == 1 ? 0 : l], w->raised[l]);
    }
    if (t->total) gap = weight * larger(least - *floors, *w->raised);
    gap /= squared, reach /= squared;
    if (!(gap > LONGER)) return 0;
    recall(s, w, b, t);
    displace(s, w, x, space);
    double share = larger(t->epsilon, 4 * norm_of(held, space, d) / larger(norm_of(space, NULL, d), TINY));
    double room = ROOM * share * reach * (size + larger(1 - gap, 0) * norm_of(space, x, d));
    return larger(gap - room - LONGER, 0);
}

/* Whether what is read afterwards keeps the promise; else, if asking again may help, how much higher
 * to aim, as reach.py does, by what is missing alone where more failed. Returns 1 where it is to be asked again. */
static int judge(const Shared *s, const Task *t, Work *w, i64 b, const double *before, const double *after,
                 double size, i64 number, int failed, const double *x, const double *held, double *space) {
    i64 m = s->m, d = s->width, target = target_of(t, b);
    const double *floors = t->floor + b * t->each, *length = s->length + target * s->classes;
    double *numbers = t->numbers + b, least = INFINITY, total = 0, worst = 0, longest = 0;
    for (i64 l = 0; l < m; l++) {
        double seen = margin(s, w, target, after, l);
        if (!(seen >= least)) least = seen;
        total += seen;
        worst = larger(worst, floors[t->each == 1 ? 0 : l] - seen);
        if (t->total) longest = larger(longest, length[l + (l >= target)]);
        w->grown[l] = seen;
    }
    if (t->total) {
        total = least = -log_sum(w->grown, m);
        worst = larger(*floors - least, 0);
    }
    int sound = isfinite(total);
    if (s->variables) odds_of(s, t, w, b, before, after);
    numbers[5 * t->count] = least;
    if (sound && worst <= 0)
        numbers[0] = larger(numbers[0], excess_of(s, t, w, b, after, least, size, x, held, space));
    t->status[b] = sound && worst <= 0 && numbers[0] <= t->tolerance ? SOLVED : INACCURATE;
    if (!sound || worst <= 0 || number + 1 >= t->rounds) return 0;
    double enough = 0, nudge = (double)(number + 1) * t->epsilon / sqrt((double)d);
    nudge *= failed ? 0 : larger(size, norm_of(held, NULL, d));
    if (number + 2 == t->rounds && !failed) {
        recall(s, w, b, t);
        displace(s, w, x, space);
        enough = larger(t->epsilon * norm_of(space, NULL, d), 4 * norm_of(held, space, d));
    }
    for (i64 l = 0; l < (t->total ? 1 : m); l++) {
        double own = t->total ? longest : s->variables ? w->length[l] : length[l + (l >= target)];
        double lack = t->total ? worst : floors[t->each == 1 ? 0 : l] - margin(s, w, target, after, l);
        if (enough > 0)
            w->raised[l] = larger(w->raised[l] + (t->epsilon < FINE ? MANY_TIMES : SOME_TIMES) * worst, own * enough);
        else if (lack > 0)
            w->raised[l] += 2 * lack + nudge * own;
    }
    return 1;
}

/* Rows from b on in float64: where they are, or copied into space; the last stands for missing ones. */
static void load_block(const Shared *s, const Task *t, i64 b, i64 count, double *space, double **x) {
    for (i64 i = 0; i < BLOCK; i++) {
        if (i >= count) {
            x[i] = x[count - 1];
            continue;
        }
        i64 bytes = bytes_of(t->kind), place = place_of(t, b + i), d = s->width, sum = t->within && t->base;
        char *from = (char *)t->x + place * t->stride * bytes;
        x[i] = t->kind == FLOAT64 && !sum ? (double *)from : space + i * d;
        if (x[i] != (double *)from) load(from, t->kind, d, x[i]);
        if (!sum) continue;
        double *base = space + (BLOCK + i) * d;
        load((const char *)t->base + place * t->base_stride * bytes, t->kind, d, base);
        add_base(t, d, x[i], base, (char *)t->result + place * d * bytes);
    }
}

/* Read a block of rows from b on, as an edit reads them, into the result (B, R). */
static void read_rows(const Shared *s, const Task *t, double *space, i64 b, i64 count) {
    double *x[BLOCK], *logits = space + BLOCK * s->width;
    load_block(s, t, b, count, space, x);
    read_block(s, x, logits, count);
    memcpy((double *)t->result + b * s->rows, logits, sizeof(double) * count * s->rows);
}

/* Leave a row as it is, bit for bit. */
static void keep(const Shared *s, const Task *t, i64 b) {
    i64 bytes = bytes_of(t->kind);
    const char *from = (const char *)t->x + place_of(t, b) * t->stride * bytes;
    memcpy((char *)t->result + place_of(t, b) * s->width * bytes, from, s->width * bytes);
}

/* Edit a block of rows from b on; 0 without memory. Says the slots needed. */
static int edit_block(const Shared *s, const Task *t, Work *w, double *space, i64 b, i64 count,
                      i64 *slots) {
    i64 d = s->width, rows = s->rows, m = s->m;
    double *spare = space + 2 * BLOCK * d, *x[BLOCK], *held[BLOCK], size[BLOCK];
    double *before = spare + 2 * d, *after = before + BLOCK * rows, *raised = after + BLOCK * rows;
    double *safe = raised + BLOCK * m; /* how far above the floors is known to be in reach */
    i64 (*solve)(const Shared *, const Task *, Work *, i64, const double *, double, int, int *) =
        t->total ? total_one : solve_one;
    int open[BLOCK] = {0}, ended[BLOCK] = {0}, failed[BLOCK] = {0}, some = 0, direct = t->kind == FLOAT64 && !t->base;
    load_block(s, t, b, count, space, x);
    read_block(s, x, before, count);
    for (i64 i = 0; i < count; i++) {
        int verdict;
        held[i] = direct ? (double *)t->result + place_of(t, b + i) * d : space + (BLOCK + i) * d;
        size[i] = norm_of(x[i], NULL, d);
        i64 needs = solve(s, t, w, b + i, before + i * rows, size[i], FRESH, &verdict);
        failed[i] = (verdict & (NEEDED | FEASIBLE)) == NEEDED;
        double highest = 0;
        for (i64 l = 0; l < (t->total ? 1 : m); l++) highest = larger(highest, w->raised[l]);
        if (needs && failed[i] && highest > NEAR) {
            /* Aims above the floors are out of reach: are floors? */
            memset(w->raised, 0, sizeof(double) * m);
            needs = solve(s, t, w, b + i, before + i * rows, size[i], RECOVER, &verdict);
        }
        if (!needs) return 0;
        if (needs - 1 > *slots) *slots = needs - 1;
        memcpy(raised + i * m, w->raised, sizeof(double) * m);
        open[i] = (verdict & (NEEDED | FEASIBLE)) == (NEEDED | FEASIBLE);
        /* Where the steps for total odds ran out, asking again is of no use. */
        ended[i] = t->total && !(verdict & CONVERGED);
        some |= open[i];
        if (open[i]) {
            move(s, t, w, b + i, x[i], held[i], spare);
            continue;
        }
        t->status[b + i] = !(verdict & VALID) ? INVALID : verdict & FEASIBLE ? UNMOVED : INFEASIBLE;
        keep(s, t, b + i);
    }
    if (!some) return 1;
    for (i64 i = 0; i < BLOCK; i++)
        if (i >= count || !open[i]) held[i] = x[i];
    read_block(s, held, after, count);
    for (i64 i = 0; i < count; i++) {
        double *seen = after + i * rows;
        if (!open[i]) continue;
        if (s->variables) stack(s, t, w, b + i);
        memcpy(w->raised, raised + i * m, sizeof(double) * m);
        for (i64 number = 0;; number++) {
            int verdict;
            const double *was = before + i * rows;
            memcpy(safe, w->raised, sizeof(double) * m);
            if (!judge(s, t, w, b + i, was, seen, size[i], number, failed[i], x[i], held[i], spare)) break;
            if (ended[i] || failed[i] > 1) break;
            i64 needs = solve(s, t, w, b + i, was, size[i], number ? LIVE : RECOVER, &verdict);
            if (needs && !(verdict & FEASIBLE)) {
                /* Out of reach: what was aimed at before counts. */
                failed[i]++;
                memcpy(w->raised, safe, sizeof(double) * m);
                needs = solve(s, t, w, b + i, was, size[i], RECOVER, &verdict);
            }
            if (!needs) return 0;
            if (needs - 1 > *slots) *slots = needs - 1;
            if (!(verdict & FEASIBLE)) {
                if (s->variables) odds_of(s, t, w, b + i, was, was);
                keep(s, t, b + i);
                break;
            }
            ended[i] = t->total && !(verdict & CONVERGED);
            move(s, t, w, b + i, x[i], held[i], spare);
            read_row(s, held + i, seen);
        }
    }
    return 1;
}

typedef struct {
    const Shared *shared;
    const Task *task;
    i64 from, to, slots;
} Part;

static void *solve_part(void *given) {
    Part *part = given;
    const Shared *s = part->shared;
    const Task *t = part->task;
    Work w = {.n = s->classes ? s->classes : s->m};
    double **parts[] = {&w.scale, &w.error, &w.gap,   &w.unit,   &w.slack,       &w.tolerance,
                        &w.row,   &w.grown, &w.start, &w.raised, &w.coefficients};
    enum { VECTORS = sizeof parts / sizeof *parts };
    i64 size = w.n > s->rows ? w.n : s->rows, stacked = s->variables > 0;
    double *vectors = malloc(sizeof(double) * size * VECTORS), *space = NULL;
    double *own = stacked ? malloc(sizeof(double) * s->m * (2 * s->m + 2)) : NULL;
    double *total = t->total ? malloc(sizeof(double) * w.n * (3 * w.n + TOTAL_VECTORS)) : NULL;
    i64 *chosen = stacked ? malloc(sizeof(i64) * (s->variables + 2 * s->m)) : NULL;
    if (t->x) space = malloc(sizeof(double) * (s->width * (2 * BLOCK + 2) + (BLOCK + 1) * s->m + BLOCK * 2 * s->rows));
    int sound = vectors && (space || !t->x) && (!stacked || (own && chosen)) && (total || !t->total) && grow(&w, 8);
    for (i64 i = 0; sound && i < VECTORS; i++) *parts[i] = vectors + i * size;
    Total problem = {.n = w.n, .gram = total};
    if (sound && t->total) {
        double **own[] = {&problem.start,  &problem.noise, &problem.found,  &problem.kept,   &problem.moved,
                          &problem.margins, &problem.share, &problem.residual, &problem.back, &problem.along,
                          &problem.pulled, &problem.slope, &problem.root,   &problem.spare,  &problem.gap,
                          &problem.best,   &problem.next,  &problem.shares};
        problem.system = total + w.n * w.n, problem.factor = problem.system + w.n * w.n;
        for (i64 i = 0; i < TOTAL_VECTORS; i++) *own[i] = problem.factor + w.n * (w.n + i);
        w.total = &problem;
    }
    if (sound && stacked) {
        w.own = own, w.noise = own + s->m * s->m, w.length = w.noise + s->m, w.combination = w.length + s->m;
        w.chosen = chosen, w.pair = chosen + s->variables, w.kind = w.pair + s->m;
        chosen[0] = KEEP - 1;
    }
    for (i64 b = part->from; sound && b < part->to; b += t->x ? BLOCK : 1) {
        if (!t->numbers) {
            read_rows(s, t, space, b, part->to - b < BLOCK ? part->to - b : BLOCK);
            continue;
        }
        if (t->x) {
            i64 count = part->to - b < BLOCK ? part->to - b : BLOCK;
            sound = edit_block(s, t, &w, space, b, count, &part->slots);
            continue;
        }
        int verdict;
        i64 slots = solve_one(s, t, &w, b, t->margins + b * s->m, 0, 0, &verdict) - 1;
        t->status[b] = verdict;
        sound = slots >= 0;
        if (slots > part->slots) part->slots = slots;
    }
    if (!sound) part->slots = -1;
    free(space);
    free(own);
    free(total);
    free(chosen);
    free(vectors);
    free(w.rows);
    free(w.inverse);
    free(w.multipliers);
    free(w.held);
    return NULL;
}

/* Solve all problems of a task: the most slots that one of them needs, of activations eight times that
 * and the worst status; -1 without memory, -2 where a target is out of range, and -3 where a probe that
 * it is told of has changed. */
i64 lrqp_solve(const Shared *shared, const Task *task, i64 threads) {
    enum { MOST = 256 };
    pthread_t running[MOST];
    Part parts[MOST];
    i64 started = 0, slots = 0, worst = 0, count = task->count, blocks = (count + BLOCK - 1) / BLOCK;
    i64 several = shared->variables, targets = task->one_target ? 1 : count * (several ? several : 1);
    for (i64 i = 0; i < task->parts; i++)
        if (memcmp(task->live[i], task->known[i], task->bytes[i])) return -3;
    for (i64 b = 0; task->target && b < targets; b++) {
        const i64 *begins = several ? shared->begins + b % several : NULL;
        i64 classes = several ? begins[1] - begins[0] : shared->classes, least = several ? KEEP : 0;
        if (task->target[b] < least || task->target[b] >= classes) return -2;
        if (several && task->source && (task->source[b] < least || task->source[b] >= classes)) return -2;
    }
    threads = threads > MOST ? MOST : threads > blocks ? blocks : threads;
    threads = threads < 1 ? 1 : threads;
    for (i64 i = 0; i < threads; i++) {
        i64 from = blocks * i / threads * BLOCK, to = blocks * (i + 1) / threads * BLOCK;
        parts[i] = (Part){shared, task, from, to < count ? to : count, 0};
    }
    for (i64 i = 1; i < threads; i++, started++)
        if (pthread_create(&running[i], NULL, solve_part, &parts[i])) break;
    solve_part(&parts[0]);
    for (i64 i = started + 1; i < threads; i++) solve_part(&parts[i]);
    for (i64 i = 1; i <= started; i++) pthread_join(running[i], NULL);
    for (i64 i = 0; i < threads; i++) {
        if (parts[i].slots < 0) return -1;
        if (parts[i].slots > slots) slots = parts[i].slots;
    }
    if (!task->x || !task->numbers) return slots;
    for (i64 b = 0; b < count; b++)
        if (task->status[b] > worst) worst = task->status[b];
    for (i64 i = 0; task->active && i < count * shared->m; i++) task->active[i] = task->multipliers[i] > 0;
    return 8 * slots + worst;
}

/* Edit rows of a stream within a model, put them in place and record them: how many were moved. -1
 * without memory, -2 where a target or row is out of range, -3 where a probe has changed, and -4
 * where a row is to raise or be skipped; then nothing is recorded. */
i64 lrqp_edit_stream(const Shared *shared, const Task *given, i64 threads, const void *x, void *result,
                     const void *base, double *record, i64 pass, i64 first) {
    Task task = *given;
    task.x = x;
    task.result = result;
    task.base = base;
    task.record = record;
    task.pass = pass;
    task.first = first;
    i64 count = task.count, moved = 0, several = shared->variables, wide = several ? 4 * several + 6 : 9;
    for (i64 b = 0; b < count; b++)
        if (place_of(&task, b) < 0 || place_of(&task, b) >= task.all) return -2;
    if (task.copies) memcpy(task.result, task.x, task.all * shared->width * bytes_of(task.kind));
    double *numbers = malloc(sizeof(double) * (count * (6 + 2 * shared->m + 4 * several) + 1));
    i64 *status = malloc(sizeof(i64) * (count + 1));
    if (numbers && status) {
        task.numbers = numbers;
        task.floor = numbers + 3 * count;
        task.multipliers = numbers + 6 * count;
        if (several) {
            task.floor = task.multipliers + count * shared->m;
            task.odds = task.floor + count * shared->m;
        }
        task.status = status;
        i64 outcome = lrqp_solve(shared, &task, threads);
        moved = outcome < 0 ? outcome : 0;
        for (i64 b = 0; moved >= 0 && b < count; b++)
            moved = status[b] > SOLVED ? -4 : moved + (status[b] == SOLVED);
        for (i64 b = 0; moved >= 0 && task.record && b < count; b++) {
            const double *own = numbers + b;
            double *row = task.record + wide * b;
            *row++ = own[4 * count];
            *row++ = own[5 * count];
            *row++ = own[3 * count];
            if (several) row += 3 * (several - 1);
            if (several) memcpy(row - 3 * several, task.odds + 4 * several * b, sizeof(double) * 3 * several);
            *row++ = sqrt(larger(own[count], 0));
            *row++ = sqrt(larger(own[2 * count], 0));
            *row++ = own[0];
            if (several) memcpy(row, task.odds + several * (4 * b + 3), sizeof(double) * several);
            row += several;
            *row++ = status[b];
            *row++ = task.numbered ? task.numbered[b] : task.first + b;
            *row++ = task.pass;
        }
    } else
        moved = -1;
    free(numbers);
    free(status);
    return moved;
}

/* What is asked of the derivative of edits with respect to their activations; names as in Task. */
typedef struct {
    i64 count, each, slots, ruled, mirror, kind, stride, gradient_stride;
    double log_odds;
    const i64 *target, *source, *index;
    const double *multipliers, *floor;
    /* Of what is differentiated, gradients of edits (B, d), multipliers (B, m), and squared distances,
     * floors and log odds before (B); each may be NULL. */
    const void *gradient;
    const double *of_multipliers, *of_squared, *of_floor, *of_before;
    const void *x;
    void *result; /* (B, d) */
} Gradient;

static double dot(const double *restrict x, const double *restrict y, i64 d) {
    Lanes sums = {0};
    double sum = 0;
    i64 j = 0;
    for (; j + 8 <= d; j += 8) sums += lanes(x + j) * lanes(y + j);
    for (; j < d; j++) sum += x[j] * y[j];
    return sum_of(sums) + sum;
}

/* M between constraints p and q of a target. */
static double between(const Shared *s, i64 target, i64 p, i64 q) {
    i64 n = s->classes;
    p += p >= target;
    q += q >= target;
    if (s->grams) return s->grams[(target * n + p) * n + q];
    return (s->matrix[target * n + p] + (s->matrix[target * n + q] - s->matrix[p * n + q])) / 2;
}

/* inverse = -M_AA^-1 of the constraints in k slots, (k, k), by sweeps from the largest pivot on; M_AA is
 * taken in constraints of unit length. What depends on others to rounding is left out. */
static void invert(const Shared *s, i64 target, const i64 *index, i64 k, double *restrict inverse,
                   double *restrict scale) {
    for (i64 i = 0; i < k; i++) scale[i] = 1 / sqrt(between(s, target, index[i], index[i]));
    for (i64 i = 0; i < k; i++)
        for (i64 j = 0; j <= i; j++)
            inverse[i * k + j] = inverse[j * k + i] =
                between(s, target, index[i], index[j]) * (scale[i] * scale[j]);
    for (i64 step = 0; step < k; step++) {
        /* What has been swept is negative. */
        i64 at = 0;
        for (i64 i = 1; i < k; i++)
            if (inverse[i * (k + 1)] > inverse[at * (k + 1)]) at = i;
        double pivot = inverse[at * (k + 1)], *restrict own = inverse + at * k;
        if (!(pivot > EPSILON)) break;
        for (i64 i = 0; i < k; i++) {
            double *restrict row = inverse + i * k, part = own[i] / pivot;
            if (i == at) continue;
            for (i64 j = 0; j < k; j++) row[j] -= part * own[j];
            row[at] = part;
        }
        for (i64 j = 0; j < k; j++) own[j] /= pivot;
        own[at] = -1 / pivot;
    }
    for (i64 i = 0; i < k; i++)
        for (i64 j = 0; j < k; j++) {
            int swept = inverse[i * (k + 1)] < 0 && inverse[j * (k + 1)] < 0;
            if (i != j) inverse[i * k + j] = swept ? inverse[i * k + j] * (scale[i] * scale[j]) : 0;
        }
    for (i64 i = 0; i < k; i++) inverse[i * (k + 1)] = fmin(inverse[i * (k + 1)], 0) * (scale[i] * scale[i]);
}

/* result = gradient - v'A with v = M_AA^-1 (A S gradient), and what floors depend on: see implicit.py.
 * space is for d + 2 R + (4 + slots) slots numbers and what an activation is loaded into. */
static void differentiate(const Shared *s, const Gradient *t, i64 b, double *space) {
    i64 d = s->width, m = s->m, rows = s->rows, slots = t->slots, target = t->target[b], k = 0, edited = 0;
    i64 bytes = bytes_of(t->kind);
    const i64 *index = t->index + b * slots;
    const double *multipliers = t->multipliers + b * m;
    double *g = space, *parts = g + d, *logits = parts + rows, *u = logits + rows, *v = u + slots;
    double *rest = v + slots, *scale = rest + slots, *inverse = scale + slots, *x = inverse + slots * slots, floors = t->of_floor ? t->of_floor[b] : 0;
    double before = t->of_before ? t->of_before[b] : 0, sign = target ? -1 : 1, own = 0;
    memset(g, 0, sizeof(double) * (d + rows));
    if (t->gradient) load((const char *)t->gradient + b * t->gradient_stride * bytes, t->kind, d, g);
    for (i64 l = 0; l < m; l++) edited |= multipliers[l] > 0;
    while (edited && k < slots && index[k] < m) k++;
    if (k && s->classes > 2 && t->gradient) own = dot(s->steering + target * d, g, d);
    for (i64 i = 0; i < k; i++) {
        i64 l = index[i];
        u[i] = t->of_multipliers ? t->of_multipliers[b * m + l] : 0;
        if (!t->gradient) continue;
        if (s->classes == 2)
            u[i] += sign * dot(s->steering, g, d);
        else
            u[i] += own - dot(s->steering + (l + (l >= target)) * d, g, d);
    }
    invert(s, target, index, k, inverse, scale);
    for (i64 i = 0; i < k; i++) v[i] = -dot(inverse + i * k, u, k);
    for (i64 i = 0; i < k; i++) {
        rest[i] = u[i];
        for (i64 j = 0; j < k; j++) rest[i] -= between(s, target, index[i], index[j]) * v[j];
    }
    for (i64 i = 0; i < k; i++) {
        double part = v[i] - dot(inverse + i * k, rest, k);
        if (t->of_squared) part += 2 * t->of_squared[b] * multipliers[index[i]];
        if (t->each == 1) floors += part;
        if (s->classes > 2) parts[index[i] + (index[i] >= target)] += part;
        parts[s->classes > 2 ? target : 0] -= s->classes > 2 ? part : sign * part;
    }
    /* A mirrored floor is -(z_t - z_v) of the strongest rival v or a given one. */
    int mirrored = t->ruled && t->mirror && floors != 0 && t->floor[b] > t->log_odds;
    i64 source = mirrored && t->source ? t->source[b] : -1, rival = source;
    if (before != 0 || (mirrored && source < 0)) {
        load((const char *)t->x + b * t->stride * bytes, t->kind, d, x);
        read_row(s, &x, logits);
        if (s->classes > 2) {
            i64 strongest = target == 0;
            for (i64 c = 0; c < rows; c++)
                if (c != target && logits[c] > logits[strongest]) strongest = c;
            rival = source < 0 ? strongest : source;
            parts[target] += before;
            parts[strongest] -= before;
        } else {
            rival = source < 0 ? 1 - target : source;
            parts[0] += sign * before;
        }
    }
    if (mirrored && rival != target) {
        if (s->classes > 2) parts[rival] += floors;
        parts[s->classes > 2 ? target : 0] -= s->classes > 2 ? floors : sign * floors;
    }
    for (i64 c = 0; c < rows; c++) {
        const double *restrict weight = s->weight + c * d;
        double part = parts[c];
        if (part != 0)
            for (i64 j = 0; j < d; j++) g[j] += part * weight[j];
    }
    store(g, t->kind, d, (char *)t->result + b * d * bytes);
}

typedef struct {
    const Shared *shared;
    const Gradient *task;
    i64 from, to;
    int sound;
} Share;

static void *differentiate_share(void *given) {
    Share *share = given;
    const Shared *s = share->shared;
    i64 slots = share->task->slots;
    double *space = malloc(sizeof(double) * (2 * s->width + 2 * s->rows + (4 + slots) * slots));
    share->sound = space != NULL;
    for (i64 b = share->from; space && b < share->to; b++) differentiate(s, share->task, b, space);
    free(space);
    return NULL;
}

/* The derivative of edits: 0, or -1 without memory. */
i64 lrqp_gradient(const Shared *shared, const Gradient *task, i64 threads) {
    enum { MOST = 256 };
    pthread_t running[MOST];
    Share shares[MOST];
    i64 started = 0, count = task->count;
    threads = threads > MOST ? MOST : threads < 1 ? 1 : threads;
    for (i64 i = 0; i < threads; i++)
        shares[i] = (Share){shared, task, count * i / threads, count * (i + 1) / threads, 1};
    for (i64 i = 1; i < threads; i++, started++)
        if (pthread_create(&running[i], NULL, differentiate_share, &shares[i])) break;
    differentiate_share(&shares[0]);
    for (i64 i = started + 1; i < threads; i++) differentiate_share(&shares[i]);
    for (i64 i = 1; i <= started; i++) pthread_join(running[i], NULL);
    for (i64 i = 0; i < threads; i++)
        if (!shares[i].sound) return -1;
    return 0;
}
