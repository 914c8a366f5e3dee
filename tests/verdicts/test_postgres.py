"""A store whose rows are in PostgreSQL: a server that is cut off, stopped, and shared."""

from __future__ import annotations

import re
import threading
from concurrent.futures import Future

import pytest

pytest.importorskip("psycopg", reason="PostgreSQL needs the extra efficientad[postgres]")

from helpers_postgres import PostgresServer
from test_store import files, record, rows, together

from efficientad.verdicts import postgres as module
from efficientad.verdicts.database import TOKEN, StoreError
from efficientad.verdicts.store import Store, Transaction


@pytest.fixture(autouse=True)
def patience(monkeypatch):
    monkeypatch.setattr(module, "LOCK_SECONDS", 0.5)


@pytest.fixture
def url(postgres):
    return postgres.schema()


@pytest.fixture
def store(tmp_path, url):
    with Store(tmp_path / "store", database=url) as opened:
        yield opened


def held(store: Store) -> tuple[threading.Event, Future]:
    """An event, and the future of a job that waits for it; what follows shares a transaction."""
    begun, go = threading.Event(), threading.Event()

    def hold(step: Transaction) -> bool:
        begun.set()
        return go.wait(10)

    future = store.submit(hold)
    assert begun.wait(10)
    return go, future


def test_a_text_with_a_nul_and_an_infinite_score_are_kept(store):
    store.add(record(float("inf"), name="a\0b")).result(10)
    (row,) = rows(store)
    assert (row["name"], row["score"], row["is_anomalous"]) == ("a\ufffdb", float("inf"), 1)


def test_a_connection_that_was_cut_between_two_verdicts_is_made_again(store, url, postgres):
    first = store.add(record()).result(10)
    assert len(rows(store)) == 1  # a reader's connection is cut, too
    postgres.disconnect()
    second = store.add(record()).result(10)
    assert [row["id"] for row in rows(store)] == [first, second]
    with pytest.raises(StoreError, match="in use by another process"):  # it has its lock again
        Store(store.folder.parent / "second", database=url)


def test_verdicts_of_a_transaction_that_is_cut_are_not_answered_and_leave_nothing(
    store, url, postgres
):
    go, _ = held(store)
    before = store.add(record())
    store.submit(lambda step: postgres.disconnect())
    after = store.add(record())
    go.set()
    for future in (before, after):
        with pytest.raises(StoreError, match="cannot be written"):
            future.result(10)
    assert rows(store) == []
    number = store.add(record()).result(10)
    assert [row["id"] for row in rows(store)] == [number]
    store.close()
    with Store(store.folder, database=url):
        assert files(store.folder) == {f"{number}.png"}


def test_a_commit_whose_answer_is_lost_keeps_the_pictures_of_its_rows(
    store, url, postgres, monkeypatch
):
    commit = store._database.commit

    def cut() -> None:
        commit()
        postgres.disconnect()
        store._database.db.execute("SELECT 1")

    with monkeypatch.context() as patch:
        patch.setattr(store._database, "commit", cut)
        lost = together(store, [record(), record()])
        for future in lost:
            with pytest.raises(StoreError, match="cannot be written"):
                future.result(10)
    stood = [row["id"] for row in rows(store)]
    assert len(stood) == 2  # once each, although nobody knows
    assert files(store.folder) == {f"{number}.png" for number in stood}


def test_verdicts_are_refused_while_the_server_is_away_and_taken_when_it_is_back(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(module, "CONNECT_SECONDS", 2)
    server = PostgresServer()
    try:
        with Store(tmp_path, database=server.url()) as store:
            first = store.add(record()).result(10)
            server.stop()
            with pytest.raises(StoreError, match=r"cannot be written: .*cannot be reached"):
                store.add(record()).result(10)
            with pytest.raises(StoreError, match="cannot be read"):
                rows(store)
            server.start()
            second = store.add(record()).result(10)
            assert [row["id"] for row in rows(store)] == [first, second]
    finally:
        server.close()


def test_one_process_holds_a_schema_and_another_schema_is_another_store(tmp_path, postgres):
    one, other = postgres.schema(), postgres.schema()
    with Store(tmp_path / "a", database=one) as a, Store(tmp_path / "b", database=other) as b:
        assert a.add(record(0.1)).result(10) == b.add(record(0.9)).result(10) == 1
        assert [row["score"] for row in rows(a)] == [0.1]
        with pytest.raises(StoreError, match="in use by another process"):
            Store(tmp_path / "c", database=one)
    Store(tmp_path / "a", database=one).close()


def test_pictures_and_rows_that_do_not_belong_together_are_refused_and_left_alone(
    tmp_path, postgres
):
    one, other = postgres.schema(), postgres.schema()
    for name, database in (("a", one), ("b", other), ("sqlite", None)):
        with Store(tmp_path / name, database=database) as store:
            store.add(record()).result(10)
    for name, database, why in (
        ("a", other, "lie in another folder than .*/a;"),
        ("new", one, "lie in another folder than .*/new;"),
        ("a", postgres.schema(), "holds pictures, and the database .* no verdicts yet"),
        ("a", None, "are in a PostgreSQL database; name it"),
        ("sqlite", postgres.schema(), "holds the verdicts of this folder"),
    ):
        with pytest.raises(StoreError, match=why):
            Store(tmp_path / name, database=database)
    for name, database in (("a", one), ("b", other), ("sqlite", None)):
        with Store(tmp_path / name, database=database) as store:
            assert (store.removed, store.missing, len(rows(store))) == (0, 0, 1)


def test_rows_go_on_without_pictures_that_are_lost_where_somebody_says_so(tmp_path, url):
    with Store(tmp_path / "a", database=url) as store:
        store.add(record()).result(10)
    with pytest.raises(StoreError) as refused:
        Store(tmp_path / "b", database=url)
    token = re.search(r"write (\w+) into (.*) to go on", str(refused.value))
    (tmp_path / "b" / TOKEN).write_text(token[1] + "\n")
    assert token[2] == str(tmp_path / "b" / TOKEN)
    with Store(tmp_path / "b", database=url) as store:
        assert store.missing == 1
        assert store.add(record()).result(10) == 2


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE {}.verdict_store SET version = 9",
        "DROP TABLE {}.verdict_store",
        "DELETE FROM {}.verdict_store",
    ],
)
def test_tables_of_another_kind_are_refused_and_left_alone(tmp_path, postgres, change):
    url = postgres.schema()
    with Store(tmp_path, database=url) as store:
        store.add(record()).result(10)
    schema = url.rpartition("%3D")[2]
    postgres.run(change.format(schema))
    with pytest.raises(StoreError, match="tables of another program or version"):
        Store(tmp_path, database=url)
    assert postgres.run(f"SELECT count(*) FROM {schema}.verdicts") == [(1,)]
    assert files(tmp_path) == {"1.png"}


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("postgresql://line3:hunter2@127.0.0.1:9/parts", "127.0.0.1/parts cannot be reached"),
        ("postgresql://line3:hunter2@[", "URL of the database cannot be read"),
        ("colour=blue password=hunter2", "URL of the database cannot be read"),
    ],
)
def test_a_database_that_is_not_there_is_named_without_its_password(tmp_path, url, why):
    with pytest.raises(StoreError, match=re.escape(why)) as refused:
        Store(tmp_path, database=url)
    assert "hunter2" not in str(refused.value)
    Store(tmp_path).close()  # the folder is free again


def test_a_schema_that_is_missing_is_said(tmp_path, postgres):
    with pytest.raises(StoreError, match="no schema of those in the search path"):
        Store(tmp_path, database=postgres.url("nowhere"))
