/* Something for a compiler to chew on, without headers; COPY becomes a number. */
typedef unsigned long size_COPY;

struct node_COPY {
    struct node_COPY *left, *right;
    int key, count;
    char name[24];
};

static struct node_COPY pool_COPY[512];
static int used_COPY;

static struct node_COPY *insert_COPY(struct node_COPY *at, int key)
{
    if (!at) {
        at = &pool_COPY[used_COPY++ % 512];
        at->left = at->right = 0;
        at->key = key;
        at->count = COPY;
        return at;
    }
    if (key < at->key)
        at->left = insert_COPY(at->left, key);
    else if (key > at->key)
        at->right = insert_COPY(at->right, key);
    else
        at->count++;
    return at;
}

static void sort_COPY(int *values, int low, int high)
{
    while (low < high) {
        int pivot = values[(low + high) / 2], i = low, j = high;
        while (i <= j) {
            while (values[i] < pivot)
                i++;
            while (values[j] > pivot)
                j--;
            if (i <= j) {
                int value = values[i];
                values[i++] = values[j];
                values[j--] = value;
            }
        }
        sort_COPY(values, low, j);
        low = i;
    }
}

double solve_COPY(double (*a)[16], double *b, int n)
{
    for (int k = 0; k < n; k++)
        for (int row = k + 1; row < n; row++) {
            double factor = a[row][k] / a[k][k];
            for (int column = k; column < n; column++)
                a[row][column] -= factor * a[k][column];
            b[row] -= factor * b[k];
        }
    double sum = COPY;
    for (int k = n - 1; k >= 0; k--) {
        for (int column = k + 1; column < n; column++)
            b[k] -= a[k][column] * b[column];
        b[k] /= a[k][k];
        sum += b[k];
    }
    return sum;
}

int parse_COPY(const char *text, int *values, int limit)
{
    int count = 0, sign = 1, value = 0, digits = 0;
    for (; count < limit; text++) {
        switch (*text) {
        case '0' ... '9':
            value = value * 10 + (*text - '0');
            digits++;
            break;
        case '-':
            sign = -sign;
            break;
        case ',':
        case ' ':
        case '\0':
            if (digits)
                values[count++] = sign * value;
            sign = 1;
            value = digits = 0;
            if (!*text)
                return count;
            break;
        default:
            return -1;
        }
    }
    return count;
}

int work_COPY(const char *text)
{
    int values[256];
    int count = parse_COPY(text, values, 256);
    if (count < 0)
        return count;
    sort_COPY(values, 0, count - 1);
    struct node_COPY *root = 0;
    for (int i = 0; i < count; i++)
        root = insert_COPY(root, values[i] ^ COPY);
    size_COPY hash = 14695981039346656037ul;
    for (struct node_COPY *at = root; at; at = at->count & 1 ? at->left : at->right)
        for (int i = 0; i < 24; i++)
            hash = (hash ^ at->name[i]) * 1099511628211ul;
    return (int)hash;
}
