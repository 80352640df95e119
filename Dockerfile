# The image of the REST service, or of the batch worker with the command `python cli.py ...`. See docs/service-clients.md.
# Both write only to /var/lib/triad and /tmp, so --read-only works.

FROM python:3.11-slim-bookworm AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /app
RUN python -m venv /opt/venv
COPY requirements.txt requirements-index.txt requirements-local-embedding.txt requirements-evaluation.txt \
    requirements-student.txt requirements-export.txt requirements-ray.txt ./
# Wheels only: no package code runs during the build, and no compiler is needed.
RUN /opt/venv/bin/python -m pip install --no-cache-dir --only-binary :all: --requirement requirements.txt
# --build-arg INDEX=yes adds the embedding index and GET /similar; INDEX=local also adds the local embedding model.
# No image has ever been built, with or without INDEX: no container engine was available.
ARG INDEX=
RUN if [ -n "$INDEX" ]; then \
        /opt/venv/bin/python -m pip install --no-cache-dir --only-binary :all: --requirement requirements-index.txt; fi \
    && if [ "$INDEX" = local ]; then \
        /opt/venv/bin/python -m pip install --no-cache-dir --no-deps --requirement requirements-local-embedding.txt; fi
# --build-arg EVALUATION=yes adds the packages of `python cli.py evaluate`.
ARG EVALUATION=
RUN if [ -n "$EVALUATION" ]; then \
        /opt/venv/bin/python -m pip install --no-cache-dir --only-binary :all: --requirement requirements-evaluation.txt; fi
# --build-arg STUDENT=yes adds those of `python cli.py student` and `--student P`.
ARG STUDENT=
RUN if [ -n "$STUDENT" ]; then \
        /opt/venv/bin/python -m pip install --no-cache-dir --only-binary :all: --requirement requirements-student.txt \
        && /opt/venv/bin/python -m pip install --no-cache-dir --no-deps --requirement requirements-local-embedding.txt; fi
# --build-arg EXPORT=yes adds those of `python cli.py export --format xlsx` and `--format parquet`.
ARG EXPORT=
RUN if [ -n "$EXPORT" ]; then \
        /opt/venv/bin/python -m pip install --no-cache-dir --only-binary :all: --requirement requirements-export.txt; fi
# --build-arg RAY=yes adds those of `python cli.py --engine ray`.
ARG RAY=
RUN if [ -n "$RAY" ]; then \
        /opt/venv/bin/python -m pip install --no-cache-dir --only-binary :all: --requirement requirements-ray.txt; fi
COPY *.py LICENSE ./
COPY config/ config/
COPY storage/ storage/
COPY network/ network/
COPY utils/ utils/
COPY domain/ domain/
COPY help_desks/ help_desks/
COPY model_server/ model_server/
COPY worker/ worker/
COPY student/ student/
COPY review/ review/
COPY service/ service/
COPY openai_batch/ openai_batch/
COPY database_docs/ database_docs/
COPY embedding_index/ embedding_index/
COPY evaluation/ evaluation/
COPY analytics/ analytics/
COPY exporting/ exporting/
COPY embedded/ embedded/
COPY cluster/ cluster/
COPY commands/ commands/
COPY schema_examples/ schema_examples/
COPY data/*.jsonl data/
RUN /opt/venv/bin/python -m compileall -q .

FROM python:3.11-slim-bookworm
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    API_HOST=0.0.0.0 \
    BATCH_FILES_DIR=/var/lib/triad/batch_files \
    INDEX_DIR=/var/lib/triad/index
# Numeric ids, because Kubernetes' runAsNonRoot cannot resolve names.
RUN install -d -m 0700 -o 10001 -g 10001 /var/lib/triad /var/lib/triad/batch_files
COPY --from=build /opt/venv /opt/venv
COPY --from=build /app /app
WORKDIR /app
USER 10001:10001
VOLUME ["/var/lib/triad"]
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s --start-period=20s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as r; r.urlopen(f\"http://127.0.0.1:{os.environ.get('API_PORT') or 8000}/health\", timeout=2)"]
CMD ["python", "main.py"]
