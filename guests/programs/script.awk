# A script for sqlite3: a table of `rows` rows, an index, and questions about them.
BEGIN {
    print "CREATE TABLE item(id INTEGER PRIMARY KEY, kind INTEGER, name TEXT, price REAL);"
    print "BEGIN;"
    seed = 12345
    for (row = 1; row <= rows; row++) {
        seed = (seed * 1103 + 12347) % 1000003
        printf "INSERT INTO item VALUES(%d, %d, 'name %d', %d.25);\n", row, seed % 97, seed, seed % 1009
    }
    print "COMMIT;"
    print "CREATE INDEX by_kind ON item(kind, price);"
    print "SELECT kind, count(*), sum(price), max(name) FROM item GROUP BY kind;"
    print "SELECT count(*) FROM item a JOIN item b ON a.kind = b.kind AND a.price = b.price;"
    print "SELECT name FROM item WHERE name LIKE '%77%' ORDER BY name DESC LIMIT 20;"
    print "UPDATE item SET price = price * 1.5 WHERE kind < 50;"
    print "DELETE FROM item WHERE id % 3 = 0;"
    print "SELECT count(*), sum(price) FROM item;"
}
