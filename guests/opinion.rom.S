# A ROM that computes in every mode and says what came out, for comparing processors.
#
# Starts at the reset vector, needs 640 KiB of RAM at 0, no devices, and writes a line with a name
# and a checksum to port 0xe9 for each group of instructions; then 0 to port 0xf4. What the
# architecture leaves undefined (some flags) is masked out. Absent is what QEMU's translator does not
# do: limits of segments, reserved bits of control registers, the place of a fault after a jump.
#
# Real mode, 32-bit protected mode, user mode and 4 KiB pages, 64-bit mode.
#
# Rebuild with guests/build; the result is committed because not every machine has an assembler.
# `guests/opinion.expected` is what QEMU TCG says.

        .set    VALUES, 0x600           # operands, copied from the ROM
        .set    VALUES_END, VALUES + 4 * 14
        .set    RESUME, 0x510           # where a fault handler goes on
        .set    BUFFER, 0x1000
        .set    STACK, 0x8000
        .set    USER_STACK, 0x7800
        .set    GDT, 0x9000
        .set    IDT, 0xa000
        .set    TSS, 0xb000
        .set    TABLES, 0x10000
        .set    ROM, 0xf0000

        .set    ALL, 0x8d5              # CF PF AF ZF SF OF
        .set    LOGIC, 0x8c5            # without AF
        .set    COUNTED, 0x0c5          # without AF and OF
        .set    CARRY, 0x001

        .set    MODE, 16

# Adds flags (masked) and a register to the checksum in EBP. Clobbers EBX.
        .macro  FOLD register, mask
        .if     MODE == 64
        pushfq
        pop     %rbx
        .else
        pushfl
        popl    %ebx
        .endif
        andl    $\mask, %ebx
        roll    $5, %ebp
        xorl    %ebx, %ebp
        addl    \register, %ebp
        .endm

# A line: the name and the checksum, which starts anew.
        .macro  LINE name
        .if     MODE == 16
        callw   line16
        .elseif MODE == 32
        call    line32
        .else
        call    line64
        .endif
        .asciz  "\name "
        .endm

# The subroutine of LINE: prints the text after the call and goes on behind it.
        .macro  PRINT
        .if     MODE == 16
        popw    %si
        movzwl  %si, %esi
        .elseif MODE == 32
        popl    %esi
        .else
        popq    %rsi
        .endif
1:      movb    %cs:(%esi), %al
        incl    %esi
        testb   %al, %al
        jz      2f
        outb    %al, $0xe9
        jmp     1b
2:      movl    $8, %ecx
3:      roll    $4, %ebp
        movl    %ebp, %eax
        andb    $15, %al
        addb    $'0', %al
        cmpb    $'9', %al
        jbe     4f
        addb    $39, %al
4:      outb    %al, $0xe9
        decl    %ecx
        jnz     3b
        movb    $10, %al
        outb    %al, $0xe9
        xorl    %ebp, %ebp
        .if     MODE == 16
        jmp     *%si
        .elseif MODE == 32
        jmp     *%esi
        .else
        jmp     *%rsi
        .endif
        .endm

# All pairs of operands, with and without a carry: EAX, EDX -> EAX, EDX.
        .macro  PAIRS name, mask, code
        movl    $VALUES, %esi
1:      movl    $VALUES, %edi
2:      movl    (%esi), %eax
        movl    (%edi), %edx
        clc
        \code
        FOLD    %eax, \mask
        addl    %edx, %ebp
        movl    (%esi), %eax
        movl    (%edi), %edx
        stc
        \code
        FOLD    %eax, \mask
        addl    %edx, %ebp
        addl    $4, %edi
        cmpl    $VALUES_END, %edi
        jb      2b
        addl    $4, %esi
        cmpl    $VALUES_END, %esi
        jb      1b
        LINE    \name
        .endm

# The same for operands and counts from 1 to 7.
        .macro  COUNTS name, mask, code
        movl    $VALUES, %esi
1:      movl    $1, %ecx
2:      movl    (%esi), %eax
        movl    4(%esi), %edx
        clc
        \code
        FOLD    %eax, \mask
        movl    (%esi), %eax
        stc
        \code
        FOLD    %eax, \mask
        incl    %ecx
        cmpl    $8, %ecx
        jb      2b
        addl    $4, %esi
        cmpl    $VALUES_END - 4, %esi
        jb      1b
        LINE    \name
        .endm

# One operand in EAX.
        .macro  SINGLES name, mask, code
        movl    $VALUES, %esi
1:      movl    (%esi), %eax
        clc
        \code
        FOLD    %eax, \mask
        movl    (%esi), %eax
        stc
        \code
        FOLD    %eax, \mask
        addl    $4, %esi
        cmpl    $VALUES_END, %esi
        jb      1b
        LINE    \name
        .endm

        .macro  PAIRS_OF op, mask
        PAIRS   \op\()b, \mask, "\op\()b %dl, %al"
        PAIRS   \op\()bh, \mask, "\op\()b %dh, %ah"
        PAIRS   \op\()w, \mask, "\op\()w %dx, %ax"
        PAIRS   \op\()l, \mask, "\op\()l %edx, %eax"
        PAIRS   \op\()m, \mask, "movl %eax, BUFFER; \op\()l %edx, BUFFER; movl BUFFER, %eax"
        .endm

        .macro  COUNTS_OF op, mask
        COUNTS  \op\()b, \mask, "\op\()b %cl, %al"
        COUNTS  \op\()w, \mask, "\op\()w %cl, %ax"
        COUNTS  \op\()l, \mask, "\op\()l %cl, %eax"
        .endm

        .macro  SINGLES_OF op, mask
        SINGLES \op\()b, \mask, "\op\()b %al"
        SINGLES \op\()w, \mask, "\op\()w %ax"
        SINGLES \op\()l, \mask, "\op\()l %eax"
        .endm

        .macro  LIKE_XADD op
        PAIRS   \op\()b, ALL, "\op\()b %al, %dl"
        PAIRS   \op\()l, ALL, "\op\()l %eax, %edx"
        .endm

        .macro  LIKE_SHL op
        COUNTS_OF \op, COUNTED
        SINGLES \op\()1, LOGIC, "\op\()l $1, %eax"
        .endm

        .macro  LIKE_ROL op
        COUNTS_OF \op, CARRY
        SINGLES \op\()1, 0x801, "\op\()l $1, %eax"
        .endm

        .macro  LIKE_SHLD op
        COUNTS  \op\()w, COUNTED, "\op\()w %cl, %dx, %ax"
        COUNTS  \op\()l, COUNTED, "\op\()l %cl, %edx, %eax"
        .endm

        .macro  LIKE_MUL op
        PAIRS   \op\()b, 0x801, "\op\()b %dl"
        PAIRS   \op\()w, 0x801, "\op\()w %dx"
        PAIRS   \op\()l, 0x801, "\op\()l %edx"
        .endm

        .macro  LIKE_BT op
        PAIRS   \op\()l, CARRY, "\op\()l %edx, %eax"
        COUNTS  \op\()m, CARRY, "movl %eax, BUFFER; \op\()l %ecx, BUFFER; movl BUFFER, %eax"
        .endm

        .macro  CONDITION cc
        PAIRS   set\cc, ALL, "cmpl %edx, %eax; set\cc %al; setn\cc %ah"
        .endm

        .macro  STRINGS way
        movl    $BUFFER + 0x100, %edi
        movl    $VALUES + 0x10, %esi
        \way
        movl    $5, %ecx
        rep movsb
        movl    $3, %ecx
        rep movsw
        movsl
        movl    $7, %ecx
        movl    $0x12345678, %eax
        rep stosl
        stosb
        FOLD    %edi, ALL
        FOLD    %esi, ALL
        movl    $VALUES + 0x10, %edi
        movl    $VALUES + 0x10, %esi
        movl    $9, %ecx
        repe cmpsb
        FOLD    %ecx, ALL
        addl    $3, %edi
        movl    $20, %ecx
        repne cmpsb
        FOLD    %ecx, ALL
        movb    $0x80, %al
        movl    $16, %ecx
        repne scasb
        FOLD    %ecx, ALL
        FOLD    %edi, ALL
        movl    $VALUES + 0x10, %esi
        lodsb
        FOLD    %eax, ALL
        lodsw
        FOLD    %eax, ALL
        lodsl
        FOLD    %eax, ALL
        xorl    %ecx, %ecx
        rep stosl
        FOLD    %edi, ALL
        cld
        LINE    string_\way
        .endm

# What 16-, 32- and 64-bit code have in common.
        .macro  COMMON
        .irp    op, add, adc, sub, sbb, cmp
        PAIRS_OF \op, ALL
        .endr
        .irp    op, and, or, xor, test
        PAIRS_OF \op, LOGIC
        .endr
        .irp    op, xadd, cmpxchg
        LIKE_XADD \op
        .endr
        .irp    op, inc, dec, neg, not
        SINGLES_OF \op, ALL
        .endr
        .irp    op, shl, shr, sar
        LIKE_SHL \op
        .endr
        .irp    op, rol, ror, rcl, rcr
        LIKE_ROL \op
        .endr
        .irp    op, shld, shrd
        LIKE_SHLD \op
        .endr
        .irp    op, mul, imul
        LIKE_MUL \op
        .endr
        PAIRS   imul2, 0x801, "imull %edx, %eax"
        PAIRS   imul3, 0x801, "imulw $-77, %dx, %ax"
        .irp    op, bt, bts, btr, btc
        LIKE_BT \op
        .endr
        SINGLES bsf, 0x40, "orl $0x100, %eax; bsfl %eax, %eax"
        SINGLES bsr, 0x40, "orl $0x100, %eax; bsrl %eax, %eax"
        SINGLES bswap, ALL, "bswap %eax"
        SINGLES movzx, ALL, "movzbl %al, %edx; addl %edx, %ebp; movzwl %ax, %eax"
        SINGLES movsx, ALL, "movsbl %al, %edx; addl %edx, %ebp; movswl %ax, %eax"
        SINGLES cwd, ALL, "cwtd; addl %edx, %ebp; cwtl"
        SINGLES cdq, ALL, "cltd; addl %edx, %ebp"
        SINGLES lahf, ALL, "sahf; lahf"
        SINGLES flags, ALL, "cmc; cld"
        .irp    cc, o, b, z, be, s, p, l, le
        CONDITION \cc
        .endr
        PAIRS   cmovl, ALL, "cmpl %edx, %eax; cmovl %edx, %eax"
        PAIRS   cmova, ALL, "cmpw %dx, %ax; cmovaw %dx, %ax"
        PAIRS   lea, ALL, "leal -3(%eax, %edx, 8), %eax"
        # Strings, upwards and downwards.
        .irp    way, cld, std
        STRINGS \way
        .endr
        movl    $BUFFER, %esi
        movl    $128, %ecx
1:      lodsl
        FOLD    %eax, 0
        decl    %ecx
        jnz     1b
        LINE    buffer
        .endm

# A division that may fault.
        .macro  DIVIDE name, op, register
        movl    $VALUES, %esi
1:      movl    $VALUES, %edi
2:      movl    (%esi), %eax
        movl    (%edi), %ecx
        movl    %ecx, %edx
        shrl    $7, %edx
        .if     MODE == 16
        movw    $3f, RESUME
        .elseif MODE == 32
        movl    $ROM + 3f, RESUME
        .else
        movq    $ROM + 3f, RESUME
        .endif
        \op     \register
        FOLD    %eax, 0
        FOLD    %edx, 0
3:      addl    $4, %edi
        cmpl    $VALUES_END, %edi
        jb      2b
        addl    $4, %esi
        cmpl    $VALUES_END, %esi
        jb      1b
        LINE    \name
        .endm

        .macro  DIVISIONS
        DIVIDE  divb, divb, %cl
        DIVIDE  divw, divw, %cx
        DIVIDE  divl, divl, %ecx
        DIVIDE  idivb, idivb, %cl
        DIVIDE  idivw, idivw, %cx
        DIVIDE  idivl, idivl, %ecx
        .endm

# Decimal arithmetic and what else 64-bit mode lacks.
        .macro  LEGACY
        SINGLES daa, 0xd5, "daa"
        SINGLES das, 0xd5, "das"
        SINGLES aaa, 0x11, "aaa"
        SINGLES aas, 0x11, "aas"
        SINGLES aam, 0xc4, "aam"
        SINGLES aad, 0xc4, "aad"
        SINGLES aam7, 0xc4, "aam $7"
        SINGLES salc, 0x01, ".byte 0xd6"
        PAIRS   das2, 0xd5, "subb %dl, %al; das"
        PAIRS   daa2, 0xd5, "addb %dl, %al; daa"
        .endm

# An instruction that may fault, with the handler's view in the checksum.
        .macro  TRY name, code
        .if     MODE == 16
        movw    $1f, RESUME
        .elseif MODE == 32
        movl    $ROM + 1f, RESUME
        .else
        movq    $ROM + 1f, RESUME
        .endif
        xorl    %eax, %eax
        \code
1:      FOLD    %eax, 0
        LINE    \name
        .endm

        .text
        .code16
        .globl  _start
_start:
        cli
        xorw    %ax, %ax
        movw    %ax, %ds
        movw    %ax, %es
        movw    %ax, %ss
        movl    $STACK, %esp
        xorl    %ebp, %ebp
        cld
        # Operands, interrupt vectors.
        movl    $values, %esi
        movl    $VALUES, %edi
        movl    $14 * 4, %ecx
        rep movsb %cs:(%si), %es:(%di)
        xorw    %di, %di
        movw    $handlers16, %ax
        movw    $32, %cx
1:      stosw
        movw    $0xf000, (%di)
        addw    $2, %di
        addw    $6, %ax
        loop    1b

        COMMON
        LEGACY
        DIVISIONS

        # Stack and control transfer.
        movl    $0x11223344, %eax
        movl    $0x55667788, %ecx
        movl    $0x99aabbcc, %edx
        movl    $0x1234, %esi
        movl    $0x4321, %edi
        pushaw
        pushal
        popaw
        popal
        FOLD    %eax, 0
        FOLD    %esi, 0
        FOLD    %esp, 0
        movl    $STACK, %esp
        xorl    %ebp, %ebp
        pushw   $-2
        pushl   $-3
        pushw   %ds
        pushl   %es                     # some processors leave the upper half as it was
        popl    %eax
        movzwl  %ax, %eax
        FOLD    %eax, 0
        popw    %ax
        popl    %ecx
        popw    %dx
        FOLD    %ecx, 0
        FOLD    %edx, 0
        FOLD    %esp, 0
        LINE    stack
        movl    %esp, %edi
        movl    $0x7ff0, %ebp
        enterw  $0x20, $0
        movl    %ebp, %eax
        movl    %esp, %ecx
        leavew
        movl    %ebp, %edx
        xorl    %ebp, %ebp
        FOLD    %eax, 0
        FOLD    %ecx, 0
        FOLD    %edx, 0
        movl    $0x7fe0, %ebp
        enterw  $0x10, $3
        movl    %ebp, %eax
        movl    %esp, %ecx
        leavew
        movl    %edi, %esp
        xorl    %ebp, %ebp
        FOLD    %eax, 0
        FOLD    %ecx, 0
        LINE    enter
        lcallw  $0xf000, $far16
        FOLD    %eax, 0
        callw   near16
        FOLD    %eax, 0
        FOLD    %esp, 0
        LINE    call
        movw    $5, %cx
        xorl    %eax, %eax
1:      addw    $3, %ax
        loopw   1b
        FOLD    %eax, 0
        movw    $9, %cx
1:      addw    $3, %ax
        cmpw    $0x18, %ax
        loopnew 1b
        FOLD    %eax, ALL
        FOLD    %ecx, 0
        jcxz    1f
        incw    %ax
1:      FOLD    %eax, 0
        LINE    loop
        movl    $VALUES, %ebx
        movb    $9, %al
        xlatb
        FOLD    %eax, 0
        ldsw    VALUES + 4, %si
        movw    %ds, %cx
        xorw    %dx, %dx
        movw    %dx, %ds
        FOLD    %esi, 0
        FOLD    %ecx, 0
        movw    $0x40, %ax
        movw    %ax, %fs
        movw    %fs:0x200, %ax
        movl    %fs:0x204, %ecx
        FOLD    %eax, 0
        FOLD    %ecx, 0
        movw    $0x10, %di
        movw    $3, %bx
        leaw    -5(%bx, %di), %ax
        FOLD    %eax, 0
        LINE    segment
        TRY     int3, "int3"
        TRY     int, "int $7"
        TRY     into, "movb $0x7f, %al; incb %al; into"
        movw    $3, BUFFER
        movw    $9, BUFFER + 2
        TRY     bound_in, "movw $5, %ax; boundw %ax, BUFFER"
        TRY     bound_out, "movw $10, %ax; boundw %ax, BUFFER"
        TRY     ud2, "ud2"
        TRY     lock, ".byte 0xf0, 0x90"
        movl    $STACK, %esp
        smsww   %ax
        andl    $1, %eax
        FOLD    %eax, 0
        LINE    smsw

        # To protected mode: tables go to RAM.
        movl    $gdt, %esi
        movl    $GDT, %edi
        movl    $gdt_end - gdt, %ecx
        rep movsb %cs:(%si), %es:(%di)
        movl    $IDT, %edi
        movl    $handlers32, %eax
        movl    $49, %ecx
1:      movw    %ax, (%di)
        movl    $0xee000008, 2(%di)
        movw    $0xf, 6(%di)
        addl    $10, %eax
        addl    $8, %edi
        decl    %ecx
        jnz     1b
        movl    $STACK, TSS + 4
        movl    $0x10, TSS + 8
        movw    $0x68, TSS + 0x66
        lgdtl   %cs:gdtr
        lidtl   %cs:idtr
        movl    %cr0, %eax
        orl     $1, %eax
        movl    %eax, %cr0
        ljmpl   $8, $ROM + protected

line16: PRINT
near16: movl    $0x77, %eax
        retw
far16:  movl    $0x99, %eax
        movw    %cs, %ax
        lretw

        # Real-mode handlers: six bytes each.
handlers16:
        .set    vector, 0
        .rept   32
        pushw   $vector
        .byte   0xe9
        .word   common16 - (. + 2)
        .byte   0x90
        .set    vector, vector + 1
        .endr
common16:
        popw    %ax
        movzwl  %ax, %eax
        FOLD    %eax, 0
        popw    %ax                     # IP
        FOLD    %eax, 0
        popw    %ax                     # CS
        FOLD    %eax, 0
        popw    %ax                     # flags
        andl    $0x300, %eax
        FOLD    %eax, 0
        jmp     *RESUME

        .code32
        .set    MODE, 32
protected:
        movl    $0x10, %eax
        movl    %eax, %ds
        movl    %eax, %es
        movl    %eax, %fs
        movl    %eax, %gs
        movl    %eax, %ss
        movl    $STACK, %esp
        xorl    %ebp, %ebp
        movw    $0x28, %ax
        ltr     %ax
        COMMON
        LEGACY
        DIVISIONS
        movl    $0x11223344, %eax
        movl    $0x1234, %esi
        pushal
        pushaw
        popaw
        popal
        FOLD    %esi, 0
        FOLD    %esp, 0
        LINE    pusha
        TRY     int3_32, "int3"
        TRY     ud2_32, "ud2"
        movl    $0x10, %eax
        movl    %eax, %fs
        TRY     selector, "movw $0x1238, %ax; movw %ax, %fs"
        TRY     not_present, "movw $0x30, %ax; movw %ax, %fs"
        TRY     stack_not_present, "movw $0x30, %ax; movw %ax, %ss"
        TRY     code_as_stack, "movw $8, %ax; movw %ax, %ss"
        TRY     limit_in, "movw $0x38, %ax; movw %ax, %fs; movl %fs:0x6fc, %eax"
        TRY     expand_down_in, "movw $0x40, %ax; movw %ax, %fs; movl %fs:0x700, %eax"
        movl    $0x10, %eax
        movl    %eax, %fs
        TRY     far_null, "ljmpl $0, $0"
        TRY     far_data, "ljmpl $0x10, $0"
        TRY     lar, "larl VALUES, %eax; movw $0x40, %cx; larl %ecx, %eax"
        TRY     lsl, "movw $0x38, %cx; lsll %ecx, %eax"
        TRY     verr, "movw $8, %cx; verw %cx; setz %al; verr %cx; setz %ah"
        TRY     arpl, "movw $0x10, %ax; movw $3, %cx; arpl %cx, %ax"
        TRY     str, "str %eax"

        # Pages: the first MiB is mapped to itself, all for users, some pages otherwise.
        movl    $TABLES, %edi
        movl    $TABLES + 0x1007, (%edi)
        movl    $TABLES + 0x1000, %edi
        movl    $7, %eax
        movl    $256, %ecx
1:      stosl
        addl    $0x1000, %eax
        decl    %ecx
        jnz     1b
        movl    $0x0, TABLES + 0x1000 + 4 * 0x20        # not present
        movl    $0x21005, TABLES + 0x1000 + 4 * 0x21    # read-only
        movl    $0x22003, TABLES + 0x1000 + 4 * 0x22    # supervisor
        movl    $0x24007, TABLES + 0x1000 + 4 * 0x23    # an alias
        movl    $TABLES, %eax
        movl    %eax, %cr3
        movl    %cr0, %eax
        orl     $0x80000000, %eax
        movl    %eax, %cr0
        TRY     page_absent, "movl 0x20123, %eax"
        TRY     page_absent_write, "movl %eax, 0x20123"
        TRY     page_read_only, "movl %eax, 0x21000; movl 0x21000, %eax"
        TRY     page_across, "movl %eax, 0x1fffe"
        TRY     page_alias, "movl $0x1234567, 0x23010; movl 0x24010, %eax"
        movl    %cr0, %eax
        orl     $0x10000, %eax
        movl    %eax, %cr0
        TRY     page_protected, "movl %eax, 0x21000"
        TRY     page_string, "movl $0x1fff0, %edi; movl $0x40, %ecx; rep stosb"
        FOLD    %edi, 0
        FOLD    %ecx, 0
        LINE    page_string_rest
        movl    TABLES + 0x1000 + 4 * 0x21, %eax
        FOLD    %eax, 0
        movl    TABLES + 0x1000 + 4 * 0x23, %eax
        FOLD    %eax, 0
        movl    TABLES + 0x1000 + 4 * 0x24, %eax
        FOLD    %eax, 0
        LINE    accessed

        # User mode.
        pushl   $0x1b | 8
        pushl   $USER_STACK
        pushl   $0x3002
        pushl   $0x23 - 0x20 + 0x50
        pushl   $ROM + user
        movl    $0x5b, 16(%esp)
        iretl
user:
        movl    %cs, %eax
        FOLD    %eax, 0
        movl    %ss, %eax
        FOLD    %eax, 0
        FOLD    %esp, 0
        pushfl
        popl    %eax
        andl    $0x3200, %eax
        FOLD    %eax, 0
        LINE    user
        movl    $0x5b, %eax
        movl    %eax, %ds
        movl    %eax, %es
        TRY     user_hlt, "hlt"
        TRY     user_cr, "movl %cr0, %eax"
        TRY     user_int, "int $0x20"
        TRY     user_segment, "movw $0x10, %ax; movw %ax, %fs"
        TRY     user_page, "movl 0x22000, %eax"
        TRY     user_page_write, "movl %eax, 0x21004"
        TRY     user_page_read, "movl 0x21004, %eax"
        TRY     user_jump, "movl $0x20000, %eax; jmp *%eax"
        TRY     user_lgdt, "lgdtl 0x1000"
        TRY     user_out, "movb $46, %al; outb %al, $0xe9"
        TRY     user_popf, "pushfl; orl $0x100, (%esp); popfl; nop; nop"
        int     $0x30
        # The handler of vector 30H goes on here, at level 0.
kernel_again:
        movl    $0x10, %eax
        movl    %eax, %ds
        movl    %eax, %es
        movl    $STACK, %esp

        # To 64-bit mode: 2 MiB pages.
        movl    %cr0, %eax
        andl    $0x7fffffff, %eax
        movl    %eax, %cr0
        movl    $TABLES, %edi
        xorl    %eax, %eax
        movl    $0xc00, %ecx
        rep stosl
        movl    $TABLES + 0x1003, TABLES
        movl    $TABLES + 0x2003, TABLES + 0x1000
        movl    $0x83, TABLES + 0x2000
        movl    $IDT, %edi
        movl    $handlers64, %eax
        movl    $32, %ecx
1:      movw    %ax, (%edi)
        movl    $0x8e000018, 2(%edi)
        movw    $0xf, 6(%edi)
        movl    $0, 8(%edi)
        movl    $0, 12(%edi)
        addl    $10, %eax
        addl    $16, %edi
        decl    %ecx
        jnz     1b
        movl    $TABLES, %eax
        movl    %eax, %cr3
        movl    $0x620, %eax
        movl    %eax, %cr4
        movl    $0xc0000080, %ecx
        rdmsr
        orl     $0x100, %eax
        wrmsr
        movl    %cr0, %eax
        orl     $0x80000002, %eax
        andl    $~4, %eax
        movl    %eax, %cr0
        ljmpl   $0x18, $ROM + long

line32: PRINT
        # Protected-mode handlers: ten bytes each, with an error code or a zero in its place.
handlers32:
        .set    vector, 0
        .rept   49
        .if     vector == 8 || (vector >= 10 && vector <= 14) || vector == 17
        .byte   0x66, 0x90
        .else
        pushl   $0
        .endif
        pushl   $vector
        .byte   0xe9
        .long   common32 - (. + 4)
        .byte   0x90
        .set    vector, vector + 1
        .endr
common32:
        movl    %ss, %eax
        movl    %eax, %ds
        popl    %eax                    # vector
        cmpl    $0x30, %eax
        je      kernel_again
        FOLD    %eax, 0
        cmpl    $14, %eax
        jne     1f
        movl    %cr2, %eax
        FOLD    %eax, 0
1:      popl    %eax                    # error code
        FOLD    %eax, 0
        movl    (%esp), %eax
        FOLD    %eax, 0
        movl    4(%esp), %eax
        FOLD    %eax, 0
        movl    8(%esp), %eax
        andl    $0x300, %eax
        FOLD    %eax, 0
        andl    $~0x100, 8(%esp)
        movl    RESUME, %eax
        movl    %eax, (%esp)
        movl    $0x5b, %eax
        testl   $3, 4(%esp)
        jnz     1f
        movl    $0x10, %eax
1:      movl    %eax, %ds
        xorl    %eax, %eax
        iretl

        .code64
        .set    MODE, 64
long:
        movl    $0x10, %eax
        movl    %eax, %ds
        movl    %eax, %es
        movl    %eax, %ss
        movl    $STACK, %esp
        xorl    %ebp, %ebp
        lidt    ROM + idtr64
        COMMON
        DIVISIONS

# Operands of 64 bits: RAX, RDX -> RAX.
        .macro  WIDE name, mask, code
        movl    $VALUES, %esi
1:      movl    $VALUES, %edi
2:      movq    (%rsi), %rax
        movq    (%rdi), %rdx
        stc
        \code
        FOLD    %eax, \mask
        shrq    $32, %rax
        FOLD    %eax, 0
        FOLD    %edx, 0
        addl    $4, %edi
        cmpl    $VALUES_END - 4, %edi
        jb      2b
        addl    $4, %esi
        cmpl    $VALUES_END - 4, %esi
        jb      1b
        LINE    \name
        .endm
        .macro  WIDE_ADD op
        WIDE    \op\()q, ALL, "\op\()q %rdx, %rax"
        .endm
        .macro  WIDE_AND op
        WIDE    \op\()q, LOGIC, "\op\()q %rdx, %rax"
        .endm
        .macro  WIDE_SHL op
        WIDE    \op\()q, COUNTED, "movl $13, %ecx; \op\()q %cl, %rax"
        .endm
        .macro  WIDE_ROL op
        WIDE    \op\()q, CARRY, "movl $37, %ecx; \op\()q %cl, %rax"
        .endm
        .macro  WIDE_MUL op
        WIDE    \op\()q, 0x801, "\op\()q %rdx"
        .endm
        .irp    op, add, adc, sub, sbb, cmp, xadd, cmpxchg
        WIDE_ADD \op
        .endr
        .irp    op, and, or, xor, test
        WIDE_AND \op
        .endr
        .irp    op, shl, shr, sar
        WIDE_SHL \op
        .endr
        .irp    op, rol, ror, rcl, rcr
        WIDE_ROL \op
        .endr
        .irp    op, mul, imul
        WIDE_MUL \op
        .endr
        WIDE    shldq, COUNTED, "shldq $23, %rdx, %rax"
        WIDE    shrdq, COUNTED, "shrdq $23, %rdx, %rax"
        WIDE    btsq, CARRY, "btsq %rdx, %rax"
        WIDE    bswapq, ALL, "bswap %rax"
        WIDE    movslq, ALL, "movslq %edx, %rax"
        WIDE    cqo, ALL, "cqto"
        WIDE    zero, ALL, "movl %edx, %eax"
        WIDE    r8, ALL, "movq %rax, %r8; leaq 5(%r8, %rdx, 2), %r15; movq %r15, %rax"
        WIDE    pushq, ALL, "pushq %rdx; pushq $-5; popq %rdx; popq %rax"
        WIDE    sse, ALL, "movq %rax, %xmm0; movq %rdx, %xmm1; paddw %xmm1, %xmm0; pmullw %xmm0, %xmm1; pxor %xmm1, %xmm0; movq %xmm0, %rax"
        WIDE    sse_double, ALL, "cvtsi2sdq %rax, %xmm8; cvtsi2sdl %edx, %xmm9; mulsd %xmm9, %xmm8; addsd %xmm9, %xmm8; movq %xmm8, %rax"
        movq    (VALUES), %rax
        TRY     canonical, "movl $1, %eax; shlq $47, %rax; movq (%rax), %rax"
        TRY     page_64, "movl $0x40000000, %eax; movl %eax, 8(%rax)"
        TRY     ud_64, ".byte 0x06"
        TRY     null_64, "xorl %eax, %eax; movl %eax, %fs; movl %fs:VALUES, %eax"
        xorl    %eax, %eax
        outb    %al, $0xf4
1:      hlt
        jmp     1b

line64: PRINT
handlers64:
        .set    vector, 0
        .rept   32
        .if     vector == 8 || (vector >= 10 && vector <= 14) || vector == 17
        .byte   0x66, 0x90
        .else
        pushq   $0
        .endif
        pushq   $vector
        .byte   0xe9
        .long   common64 - (. + 4)
        .byte   0x90
        .set    vector, vector + 1
        .endr
common64:
        popq    %rax
        FOLD    %eax, 0
        cmpl    $14, %eax
        jne     1f
        movq    %cr2, %rax
        FOLD    %eax, 0
1:      popq    %rax
        FOLD    %eax, 0
        movq    (%rsp), %rax
        FOLD    %eax, 0
        movq    24(%rsp), %rax          # RSP
        FOLD    %eax, 0
        movq    $STACK, 24(%rsp)
        movq    RESUME, %rax
        movq    %rax, (%rsp)
        xorl    %eax, %eax
        iretq

        .balign 8
values: .long   0, 1, -1, 0x7fffffff, 0x80000000, 0x7f, 0x80, 0x7fff, 0x8000, 0x12345678
        .long   0xfedcba98, 0x00990099, 0x0000ffff, 0x55aa1180
gdt:    .quad   0
        .quad   0x00cf9b000000ffff      # 08 code
        .quad   0x00cf93000000ffff      # 10 data
        .quad   0x00af9b000000ffff      # 18 64-bit code
        .quad   0
        .quad   0x0000890000000067 | TSS << 16  # 28 task
        .quad   0x00cf13000000ffff      # 30 not present
        .quad   0x00409100000006ff      # 38 read-only, limit 6ffH
        .quad   0x00409700000006ff      # 40 expand-down above 6ffH
        .quad   0
        .quad   0x00cffb000000ffff      # 50 user code
        .quad   0x00cff3000000ffff      # 58 user data
gdt_end:
gdtr:   .word   gdt_end - gdt - 1
        .long   GDT
idtr:   .word   49 * 8 - 1
        .long   IDT
idtr64: .word   32 * 16 - 1
        .quad   IDT
        .org    0xfff0, 0xf4
        .code16
        ljmpw   $0xf000, $_start
        .org    0x10000, 0xf4
