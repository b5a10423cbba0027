/* Rows of a stream put in their places in one pass over them, which following.py calls on the memory of
 * tensors; and passes that are like the one before, which repeats.py has recognised and edited in calls
 * that Python makes like those of its own functions. Compiled like qp/dual.c. */

#include <stdint.h>
#include <string.h>

typedef int64_t i64;
typedef enum { FLOAT64, FLOAT32, BFLOAT16, FLOAT16 } Kind;

/* Whether a row has a number that is none, or infinite (2), or differs from another row (1); zeros of
 * either sign are equal. Without branches, so that many numbers are looked at together. */
#define LOOK(name, bits, exponent)                                                         \
    static int name(const bits *row, const bits *other, i64 width) {                       \
        const bits all = (bits)-1, unsigned_ = (bits)(all >> 1);                           \
        bits broken = 0, differs = 0;                                                      \
        for (i64 j = 0; j < width; j++) {                                                  \
            broken |= (bits)((row[j] & (exponent)) == (exponent));                         \
            differs |= (bits)(((row[j] | other[j]) & unsigned_) != 0 && row[j] != other[j]); \
        }                                                                                  \
        return (broken ? 2 : 0) | (differs ? 1 : 0);                                       \
    }
LOOK(look_double, uint64_t, 0x7ff0000000000000u)
LOOK(look_single, uint32_t, 0x7f800000u)
LOOK(look_brain, uint16_t, 0x7f80u)
LOOK(look_half, uint16_t, 0x7c00u)

/* The same where the stream is a base and what is written: the row differs from their sum, and what is
 * to be written of it is the row less the base, each rounded once as torch does. */
#define LEAVE(name, number)                                                                           \
    static int name(const number *row, const number *base, const number *held, number *into, i64 d) { \
        int broken = 0, differs = 0;                                                                  \
        for (i64 j = 0; j < d; j++) {                                                                 \
            broken |= !(row[j] - row[j] == 0);                                                        \
            differs |= row[j] != base[j] + held[j];                                                   \
        }                                                                                             \
        for (i64 j = 0; differs && j < d; j++) into[j] = row[j] - base[j];                    \
        return (broken ? 2 : 0) | (differs ? 1 : 0);                                                  \
    }
LEAVE(leave_double, double)
LEAVE(leave_single, float)

/* The stream (R, d) with rows (N, d) in their places (N), or in order where there are none; with a base
 * (R, d) beside the stream what is written of the rows. Returns 0 where none differs from what is there,
 * 1 where the result is to be taken, and below 0 where a number is not finite or a place is none: then
 * the result is not to be used. */
i64 lrqp_put_rows(const void *stream, const void *base, void *result, const void *rows, const i64 *place,
                  i64 count, i64 all, i64 width, i64 kind, i64 copies) {
    i64 size = width * (kind == FLOAT64 ? 8 : kind == FLOAT32 ? 4 : 2);
    int seen = 0;
    if (base && kind != FLOAT64 && kind != FLOAT32) return -2;
    if (base && copies) memcpy(result, stream, all * size);
    for (i64 b = 0; b < count; b++) {
        i64 at = place ? place[b] : b;
        if (at < 0 || at >= all) return -2;
        const void *row = (const char *)rows + b * size, *held = (const char *)stream + at * size;
        if (base) {
            const void *under = (const char *)base + at * size;
            void *into = (char *)result + at * size;
            seen |= kind == FLOAT64 ? leave_double(row, under, held, into, width)
                                    : leave_single(row, under, held, into, width);
            continue;
        }
        if (kind == FLOAT64) seen |= look_double(row, held, width);
        if (kind == FLOAT32) seen |= look_single(row, held, width);
        if (kind == BFLOAT16) seen |= look_brain(row, held, width);
        if (kind == FLOAT16) seen |= look_half(row, held, width);
    }
    if (seen != 1) return seen ? -1 : 0;
    if (base) return 1;
    if (copies) memcpy(result, stream, all * size);
    for (i64 b = 0; b < count; b++)
        memcpy((char *)result + (place ? place[b] : b) * size, (const char *)rows + b * size, size);
    return 1;
}

/* Python, as far as its stable interface goes, which needs no header. */
typedef struct _object Object;
typedef intptr_t Index;
typedef struct {
    const char *name;
    Object *(*function)(Object *, Object *const *, Index);
    int flags;
    const char *said;
} Method;
enum { METH_FASTCALL = 0x80 };

Object *PyCFunction_NewEx(Method *, Object *, Object *);
int PyContextVar_Get(Object *, Object *, Object **);
Object *PyDict_GetItemWithError(Object *, Object *);
int PyDict_DelItem(Object *, Object *);
int PyDict_Next(Object *, Index *, Object **, Object **);
Index PyDict_Size(Object *);
void PyErr_Clear(void);
Object *PyErr_Occurred(void);
void PyEval_RestoreThread(void *);
void *PyEval_SaveThread(void);
int PyList_Append(Object *, Object *);
Object *PyList_GetItem(Object *, Index);
int PyList_SetItem(Object *, Index, Object *);
Index PyList_Size(Object *);
long long PyLong_AsLongLong(Object *);
Object *PyIter_Next(Object *);
void *PyLong_AsVoidPtr(Object *);
Object *PyObject_CallFunctionObjArgs(Object *, ...);
Object *PyObject_GenericGetDict(Object *, void *);
Object *PyObject_GetAttr(Object *, Object *);
int PyObject_RichCompareBool(Object *, Object *, int);
Object *PyObject_Type(Object *);
int PySequence_Contains(Object *, Object *);
unsigned long PyThread_get_thread_ident(void);
Object *PyTuple_GetItem(Object *, Index);
Object *PyTuple_New(Index);
int PyTuple_SetItem(Object *, Index, Object *);
Index PyTuple_Size(Object *);
void Py_DecRef(Object *);
void Py_IncRef(Object *);

/* A tensor, as DLPack describes it. */
typedef struct {
    void *data;
    int32_t device, number, axes;
    uint8_t code, bits;
    uint16_t lanes;
    i64 *shape, *strides;
    uint64_t ahead;
} Look;
enum { AXES = 4, CPU = 1, FLOATING = 2 };

/* What a tensor was. */
typedef struct {
    const void *data;
    i64 device, kind, axes, shape[AXES], strides[AXES];
} Seen;

/* What is asked again and again, as repeats.py lays it down once; Python keeps it. */
static struct {
    int (*look)(void *, Look *);
    Object *none, *no, *outside, *tensor, *tuple, *tracing, *backward, *gradients, *like, *clone,
        *asks, *version, *stream, *yes, *below, *training, *forward;
} known;

void lrqp_know(const void *given) { memcpy(&known, given, sizeof known); }

static int looked(Object *tensor, Look *now) {
    if (known.look(tensor, now) < 0) {
        PyErr_Clear();
        return 0;
    }
    /* What transforms hold in place of a tensor has no memory. */
    int there = now->data != NULL;
    now->data = (char *)now->data + now->ahead;
    return there && now->axes <= AXES;
}

/* Note what a tensor is; 0 where that cannot be told. */
i64 lrqp_see(Object *tensor, Seen *into) {
    Look now;
    if (!looked(tensor, &now)) return 0;
    into->data = now.data;
    into->device = (i64)now.device << 32 | (uint32_t)now.number;
    into->kind = now.code | now.bits << 8 | now.lanes << 16;
    into->axes = now.axes;
    for (i64 i = 0; i < now.axes; i++) {
        into->shape[i] = now.shape[i];
        into->strides[i] = now.strides[i];
    }
    return 1;
}

static int shaped(const Look *now, const Seen *was) {
    if (now->axes != was->axes) return 0;
    for (i64 i = 0; i < was->axes; i++)
        if (now->shape[i] != was->shape[i]) return 0;
    return 1;
}

static int alike(const Look *now, const Seen *was) {
    if (!shaped(now, was)) return 0;
    for (i64 i = 0; i < was->axes; i++)
        if (now->strides[i] != was->strides[i]) return 0;
    return was->device == ((i64)now->device << 32 | (uint32_t)now->number) &&
           was->kind == (now->code | now->bits << 8 | now->lanes << 16);
}

/* Whether a result of Python is this object; it is given back. */
static int is(Object *found, Object *wanted) {
    if (!found) {
        PyErr_Clear();
        return 0;
    }
    Py_DecRef(found);
    return found == wanted;
}

static int gives(Object *function, Object *wanted) {
    return is(PyObject_CallFunctionObjArgs(function, NULL), wanted);
}

static int is_tensor(Object *one) { return is(PyObject_Type(one), known.tensor); }

static int counts(Object *tensor, i64 version) {
    Object *found = PyObject_GetAttr(tensor, known.version);
    i64 now = found ? PyLong_AsLongLong(found) : -1;
    if (found) Py_DecRef(found);
    if (PyErr_Occurred()) PyErr_Clear();
    return now >= 0 && now == version;
}

static Object *nothing(void) {
    if (PyErr_Occurred()) PyErr_Clear();
    Py_IncRef(known.none);
    return known.none;
}

static void *own_of(Object *held) { return PyLong_AsVoidPtr(PyTuple_GetItem(held, 0)); }

/* A pass of a trunk, and what it was given: in place of a tensor any other, of which a mask is looked at. */
typedef struct {
    Object *open, *opening, *calls, *call, *names, *values, *latest, *mask; /* one that cannot be looked at */
    const void *copy; /* of the mask, or NULL */
    i64 bytes, version, thread, place, masked_at, count;
    Seen tokens, masked;
} Begin;

static int still(const Begin *own, Object *mask) {
    Look now;
    if (!own->copy) return mask == own->mask && counts(mask, own->version);
    return looked(mask, &now) && alike(&now, &own->masked) && !memcmp(now.data, own->copy, own->bytes);
}

/* begin(args, kwargs): the call, noted as under way, where all is as it was but the tokens; else None. */
static Object *begin(Object *held, Object *const *given, Index n) {
    (void)n;
    Begin *own = own_of(held);
    Object *args = given[0], *kwargs = given[1], *name, *value, *tokens = NULL, *mask = NULL, *opened;
    Index first = PyTuple_Size(args), rest = PyDict_Size(kwargs), at = 0, i = 0;
    Look now;
    if (own->thread != (i64)PyThread_get_thread_ident() || rest != PyTuple_Size(own->names) ||
        first + rest != PyTuple_Size(own->values) || PyContextVar_Get(own->open, NULL, &opened) < 0 ||
        !opened)
        return nothing();
    int here = PySequence_Contains(opened, own->opening) == 1;
    Py_DecRef(opened);
    if (!here || !gives(known.tracing, known.none) || !gives(known.backward, known.outside)) return nothing();
    for (; i < first + rest; i++) {
        if (i < first)
            value = PyTuple_GetItem(args, i);
        else if (!PyDict_Next(kwargs, &at, &name, &value) ||
                 PyObject_RichCompareBool(name, PyTuple_GetItem(own->names, i - first), 2) != 1)
            return nothing();
        Object *was = PyTuple_GetItem(own->values, i);
        if (was == known.tensor ? !is_tensor(value) : value != was) return nothing();
        if (i == own->place) tokens = value;
        if (i == own->masked_at) mask = value;
    }
    if (!tokens || !looked(tokens, &now) || !shaped(&now, &own->tokens) || (mask && !still(own, mask)))
        return nothing();
    if (now.code == FLOATING && !is(PyObject_GetAttr(tokens, known.asks), known.no)) return nothing();
    if (PyList_Append(own->calls, own->call) < 0) return nothing();
    Py_IncRef(tokens);
    PyList_SetItem(own->latest, 0, tokens);
    Py_IncRef(mask = mask ? mask : known.none);
    PyList_SetItem(own->latest, 1, mask);
    own->count++;
    Py_IncRef(own->call);
    return own->call;
}

/* Something that an edit was found by. */
typedef struct {
    Object *of, *key, *is; /* NULL in place of what is not there */
    i64 kind, version;
    Seen seen;
} Guard;
enum { ITEM, OWN, NAMED, KIND, PART };

/* Whether all is where it was. */
i64 lrqp_holds(const Guard *guards, i64 count) {
    Look now;
    for (const Guard *one = guards; one < guards + count; one++) {
        if (one->kind == PART) {
            if (!looked(one->of, &now) || now.data != one->seen.data || !alike(&now, &one->seen)) return 0;
            if (one->version >= 0 && !counts(one->of, one->version)) return 0;
        } else if (one->kind == NAMED) {
            if (!is(PyObject_GetAttr(one->of, one->key), one->is)) return 0;
        } else if (one->kind == KIND) {
            if (!is(PyObject_Type(one->of), one->is)) return 0;
        } else {
            Object *owned = one->kind == OWN ? PyObject_GenericGetDict(one->of, NULL) : one->of;
            Object *found = owned ? PyDict_GetItemWithError(owned, one->key) : NULL;
            if (owned && one->kind == OWN) Py_DecRef(owned);
            if (PyErr_Occurred()) PyErr_Clear();
            if (found != one->is) return 0;
        }
    }
    return 1;
}

typedef i64 Solve(const void *, const void *, i64, const void *, void *, const void *, double *, i64, i64);

/* A site in a pass, and what is done there. */
typedef struct {
    i64 thread;
    Object *calls, *call, *residuals, *key, *parts; /* by thread what is added; what asks for gradients */
    const Guard *guards;
    i64 n_guards;
    Seen stream;
    i64 copies; /* whether the call copies what is not edited */
    Object *passes; /* gives each pass of the context its number */
    i64 done;       /* whether there was one that this has edited */
    /* An edit in one call, and its record for so many passes. */
    Solve *solve;
    const void *shared, *task;
    i64 threads, first;
    double *record;
    i64 numbers, row_of, used, room; /* of a pass, and of a row, of which the last is the pass */
    /* Rows that a function of Python edits. */
    Object *rows;
    Seen row;
    const i64 *place;
    i64 count, all, width, kind;
} Site;

static int asks(Object *tensor) { return !is(PyObject_GetAttr(tensor, known.asks), known.no); }

/* Whether nothing asks for gradients where these are kept. */
static int plain(const Site *own, Object *stream, Object *residual) {
    if (gives(known.gradients, known.no)) return 1;
    if (asks(stream) || (residual && asks(residual))) return 0;
    for (Index i = 0; i < PyTuple_Size(own->parts); i++)
        if (asks(PyTuple_GetItem(own->parts, i))) return 0;
    return 1;
}

/* like(stream, residual or None): the stream where both and what edits them are as they were; else None. */
static Object *like(Object *held, Object *const *given, Index n) {
    Site *own = own_of(held);
    Look now;
    for (Index i = 0; i < n; i++)
        if (given[i] != known.none &&
            !(is_tensor(given[i]) && looked(given[i], &now) && alike(&now, &own->stream)))
            return nothing();
    if (!lrqp_holds(own->guards, own->n_guards)) return nothing();
    if (!plain(own, given[0], given[1] == known.none ? NULL : given[1])) return nothing();
    Py_IncRef(given[0]);
    return given[0];
}

/* The stream in what a module gives or is given, where the pass and what edits it are as they were. */
static Object *met(const Site *own, Object *given, Object *kwargs, Look *now, Object **residual, Look *base) {
    Index last = PyList_Size(own->calls), at = 0;
    Object *stream = given, *name, *value;
    if (own->thread != (i64)PyThread_get_thread_ident() || last < 1 ||
        PyList_GetItem(own->calls, last - 1) != own->call)
        return NULL;
    if (is(PyObject_Type(given), known.tuple)) {
        if (!PyTuple_Size(given)) return NULL;
        stream = PyTuple_GetItem(given, 0);
    }
    if (!is_tensor(stream) || !looked(stream, now) || !alike(now, &own->stream)) return NULL;
    /* Of a module's arguments none else may be the stream, or stand for it. */
    for (Index i = 1; kwargs && i < PyTuple_Size(given); i++)
        if (PyTuple_GetItem(given, i) == stream) return NULL;
    while (kwargs && PyDict_Next(kwargs, &at, &name, &value))
        if (value == stream || PyObject_RichCompareBool(name, known.stream, 2) != 0) return NULL;
    if (own->residuals) {
        *residual = PyDict_GetItemWithError(own->residuals, own->key);
        if (!*residual || !is_tensor(*residual) || !looked(*residual, base) || !alike(base, &own->stream))
            return NULL;
    }
    return lrqp_holds(own->guards, own->n_guards) && plain(own, stream, *residual) ? stream : NULL;
}

/* What a module goes on with in place of what it gave or was given. */
static Object *with(Object *given, Object *stream, Object *result) {
    if (given == stream) return result;
    Index size = PyTuple_Size(given);
    Object *whole = PyTuple_New(size);
    if (whole) PyTuple_SetItem(whole, 0, result);
    for (Index i = 1; whole && i < size; i++) {
        Object *item = PyTuple_GetItem(given, i);
        Py_IncRef(item);
        PyTuple_SetItem(whole, i, item);
    }
    if (!whole) Py_DecRef(result);
    return whole ? whole : nothing();
}

/* Memory like a stream's, with its numbers where the call does not copy them. */
static Object *room_for(const Site *own, Object *stream, Look *there) {
    Object *result = PyObject_CallFunctionObjArgs(own->copies ? known.like : known.clone, stream, NULL);
    if (result && looked(result, there) && alike(there, &own->stream)) return result;
    if (result) Py_DecRef(result);
    return NULL;
}

/* The number of the pass that is under way; at once, as threads may share a context. */
static i64 numbered(const Site *own) {
    Object *number = PyIter_Next(own->passes);
    i64 value = number ? PyLong_AsLongLong(number) : -1;
    if (number) Py_DecRef(number);
    return value;
}

/* edit(given[, kwargs]): what goes on in its place, the same object where nothing is moved; None where
 * nothing was done. */
static Object *edit(Object *held, Object *const *given, Index n) {
    Site *own = own_of(held);
    Look now, base = {0}, there;
    Object *residual = NULL, *stream = NULL;
    i64 slot = own->used;
    if (slot < own->room) stream = met(own, given[0], n > 1 ? given[1] : NULL, &now, &residual, &base);
    Object *result = stream ? room_for(own, stream, &there) : NULL;
    if (!result) return nothing();
    double *record = own->record ? own->record + slot * own->numbers : NULL;
    if (residual) Py_IncRef(residual);
    void *state = PyEval_SaveThread();
    i64 moved = own->solve(own->shared, own->task, own->threads, now.data, there.data, base.data, record,
                           -1, own->first);
    PyEval_RestoreThread(state);
    if (residual) Py_DecRef(residual);
    /* Another thread may have had the record read meanwhile. */
    if (moved < 0 || own->used != slot || slot >= own->room) {
        Py_DecRef(result);
        return nothing();
    }
    i64 number = numbered(own);
    for (i64 last = own->row_of - 1; record && last < own->numbers; last += own->row_of) record[last] = number;
    if (record) own->used++;
    own->done = 1;
    if (residual) PyDict_DelItem(own->residuals, own->key);
    if (moved) return with(given[0], stream, result);
    Py_DecRef(result);
    Py_IncRef(given[0]);
    return given[0];
}

/* gather(given[, kwargs]): a copy of the rows that are to be edited, or None. */
static Object *gather(Object *held, Object *const *given, Index n) {
    Site *own = own_of(held);
    Look now, base = {0}, there;
    Object *residual = NULL, *x = NULL;
    if (met(own, given[0], n > 1 ? given[1] : NULL, &now, &residual, &base))
        x = PyObject_CallFunctionObjArgs(known.like, own->rows, NULL);
    if (!x) return nothing();
    i64 size = own->width * (now.bits / 8), fits = looked(x, &there) && alike(&there, &own->row);
    for (i64 b = 0; fits && b < own->count; b++) {
        i64 at = own->place ? own->place[b] : b;
        fits = at >= 0 && at < own->all;
        if (fits) memcpy((char *)there.data + b * size, (const char *)now.data + at * size, size);
    }
    if (fits) return x;
    Py_DecRef(x);
    return nothing();
}

/* put(given, rows): as edit, with what became of the rows; None where one is to look at it. */
static Object *put(Object *held, Object *const *given, Index n) {
    (void)n;
    Site *own = own_of(held);
    Look now, rows, there;
    Object *stream = is_tensor(given[0]) ? given[0] : PyTuple_GetItem(given[0], 0), *result = NULL;
    if (stream && is_tensor(given[1]) && looked(given[1], &rows) && alike(&rows, &own->row) &&
        looked(stream, &now) && alike(&now, &own->stream) &&
        (gives(known.gradients, known.no) || !(asks(given[1]) || asks(stream))))
        result = room_for(own, stream, &there);
    if (!result) return nothing();
    i64 outcome = lrqp_put_rows(now.data, NULL, there.data, rows.data, own->place, own->count, own->all,
                                own->width, own->kind, own->copies);
    if (outcome >= 0) own->done = numbered(own) >= 0;
    if (outcome > 0) return with(given[0], stream, result);
    Py_DecRef(result);
    if (outcome) return nothing();
    Py_IncRef(given[0]);
    return given[0];
}

/* A module below a model, or that itself, and its children by their names. */
typedef struct {
    Object *module, *kind, *own, *below;
    i64 first, count;
} Module;
typedef struct {
    const Module *all;
    Object *const *names, *const *children;
    i64 count;
} Modules;

/* Whether a table has these entries, as objects, in order. */
static int has(Object *table, Object *const *keys, Object *const *values, i64 count) {
    Object *key, *value;
    Index at = 0;
    if (PyDict_Size(table) != count) return 0;
    for (i64 i = 0; i < count; i++)
        if (!PyDict_Next(table, &at, &key, &value) || key != keys[i] || value != values[i]) return 0;
    return 1;
}

/* same(table): True where it has the entries of what is laid down first, else None. */
static Object *same(Object *held, Object *const *given, Index n) {
    (void)n;
    const Modules *own = own_of(held);
    if (!has(given[0], own->names, own->children, own->count)) return nothing();
    Py_IncRef(known.yes);
    return known.yes;
}

/* modules(model): False where all below a model is as it was, of the same classes, in no training mode and
 * without a forward of its own; True where something is in training; None where one is to look at it. */
static Object *modules(Object *held, Object *const *given, Index n) {
    (void)n;
    const Modules *own = own_of(held);
    Object *found = known.no;
    /* What they are lies all over the memory: it is asked for before it is needed. Where a table of
     * Python's has its own is but a guess of what to ask for. */
    for (const Module *one = own->all; one < own->all + own->count; one++) {
        __builtin_prefetch(one->module);
        __builtin_prefetch(one->own);
        __builtin_prefetch(one->below);
    }
    for (const Module *one = own->all; one < own->all + own->count; one++) {
        const char *const *parts = (const char *const *)one->own;
        for (i64 i = 4; i < 6 && one->module; i++) __builtin_prefetch(parts[i]);
        if (one->module) __builtin_prefetch(parts[5] + 64);
        if (one->count) __builtin_prefetch(((const char *const *)one->below)[4]);
    }
    for (const Module *one = own->all; one < own->all + own->count; one++) {
        Object *module = one->module ? one->module : given[0];
        Object *table = PyObject_GenericGetDict(module, NULL);
        if (!is(table, one->own) || !is(PyObject_Type(module), one->kind) ||
            PyDict_GetItemWithError(one->own, known.below) != one->below ||
            !has(one->below, own->names + one->first, own->children + one->first, one->count) ||
            PyDict_GetItemWithError(one->own, known.forward))
            return nothing();
        if (PyDict_GetItemWithError(one->own, known.training) != known.no) found = known.yes;
    }
    if (PyErr_Occurred()) PyErr_Clear();
    Py_IncRef(found);
    return found;
}

/* One of these functions for what a tuple holds, of which the first is the address of its structure. */
Object *lrqp_bound(i64 which, Object *held) {
    static Method methods[] = {
        {"begin", begin, METH_FASTCALL, 0},
        {"edit", edit, METH_FASTCALL, 0},
        {"gather", gather, METH_FASTCALL, 0},
        {"put", put, METH_FASTCALL, 0},
        {"modules", modules, METH_FASTCALL, 0},
        {"same", same, METH_FASTCALL, 0},
        {"like", like, METH_FASTCALL, 0},
    };
    return PyCFunction_NewEx(&methods[which], held, NULL);
}
